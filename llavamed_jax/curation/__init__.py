"""Makes training data: images from PubMed Central, records of figures, conversations, and shards."""
