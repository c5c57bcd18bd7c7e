"""The config group `judge` that eval recipes share."""

from ml_collections import ConfigDict


def judge_settings() -> ConfigDict:
    """Returns the config group `judge` with its defaults.

    Nothing is judged while `model` is empty. The API key comes from the environment variable `JUDGE_API_KEY`, or else
    `OPENAI_API_KEY`.
    """
    cfg = ConfigDict()
    cfg.model = ""  # the model's name at the server; for Azure, the deployment
    cfg.endpoint = "https://api.openai.com/v1"  # or any server of its protocol
    cfg.azure_version = ""  # Azure's api-version; `endpoint` is then https://NAME.openai.azure.com
    cfg.prompt = ""  # a file with [[system]] and [[instruction]]; "" uses this project's prompt
    cfg.max_tokens = 1024  # per reply
    cfg.temperature = 0.0
    cfg.concurrency = 8  # requests at the same time
    cfg.timeout = 120.0  # seconds
    cfg.retries = 8
    cfg.price_prompt = 0.0  # US dollars per million tokens; for the estimate and the report
    cfg.price_answer = 0.0
    cfg.cache = ""  # the file where replies are kept; "" means judge_cache.jsonl in the workdir
    return cfg
