"""The config group `judge` that eval recipes share."""

from ml_collections import ConfigDict


def judge_settings() -> ConfigDict:
    """The keys `judge.…`. Nothing is judged while `model` is empty; the key is `JUDGE_API_KEY`, else `OPENAI_API_KEY`, of the
    environment."""
    cfg = ConfigDict()
    cfg.model = ""  # as the server knows it; Azure's deployment
    cfg.endpoint = "https://api.openai.com/v1"  # or any server of its protocol
    cfg.azure_version = ""  # Azure's api-version; `endpoint` is then https://NAME.openai.azure.com
    cfg.prompt = ""  # a file with [[system]] and [[instruction]]; "" is the project's own
    cfg.max_tokens = 1024  # of a reply
    cfg.temperature = 0.0
    cfg.concurrency = 8  # requests under way
    cfg.timeout = 120.0  # seconds
    cfg.retries = 8
    cfg.price_prompt = 0.0  # US dollars a million tokens; for the estimate and the report
    cfg.price_answer = 0.0
    cfg.cache = ""  # the file of replies that were paid for; "" is judge_cache.jsonl in the workdir
    return cfg
