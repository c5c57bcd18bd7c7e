"""Meshes and sharding of arrays over devices, and the processes of one run."""
