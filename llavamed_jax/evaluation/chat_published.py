"""The chat results that LLaVA-Med's paper printed, and a check whether a run is comparable with them.

The numbers are relative scores in percent, from the paper's table of chat results (`images/llava_med_chat.png` of its
repository). The judge was GPT-4 of 14 March 2023, asked by v1.0's code at temperature 0.
"""

from __future__ import annotations

from llavamed_jax.datasets.qa50 import ChatSet
from llavamed_jax.evaluation.judging.judge import Judge
from llavamed_jax.evaluation.judging.prompts import ORIGINAL_WORDING

JUDGE = "gpt-4-0314"
COLUMNS = ("conversation", "detailed_description", "chest_xray", "mri", "histology", "gross", "ct_scan", "overall")
ROWS = {
    "LLaVA": (39.4, 26.2, 41.6, 33.4, 38.4, 32.9, 33.4, 36.1),
    "LLaVA-Med, stage 1 only": (22.6, 25.2, 25.8, 19.0, 24.8, 24.7, 22.2, 23.3),
    "LLaVA-Med, 10K": (42.4, 32.5, 46.1, 36.7, 43.5, 34.7, 37.5, 39.9),
    "LLaVA-Med, 60K": (53.7, 36.9, 57.3, 39.8, 49.8, 47.4, 52.4, 49.4),
    "LLaVA-Med, 60K-IM": (55.1, 36.4, 56.2, 40.4, 52.7, 51.8, 50.1, 50.2),
}


def differences(questions: ChatSet, judge: Judge, has_marker: bool, n_unscored: int,
                n_read_otherwise: int = 0) -> list[str]:
    """Lists the differences between a run and the paper's; without any, the numbers are comparable.

    Args:
      questions: the questions of the run.
      judge: the judge of the run.
      has_marker: whether "<image>" stays in the judge's question.
      n_unscored: number of questions without a score.
      n_read_otherwise: number of replies that were rejected and asked for again, although the original would have read
        scores from them.

    Returns:
      One phrase for each difference.
    """
    found = []
    if not questions.is_published:
        found.append(f"the questions are not the published file (SHA-256 {questions.sha256[:8]}…)")
    if judge.cfg.model != JUDGE:
        found.append(f"the judge is {judge.cfg.model}, and the paper's was {JUDGE}")
    if judge.prompt.wording != ORIGINAL_WORDING:
        found.append("the judge's instruction has another wording")
    if judge.cfg.temperature != 0:
        found.append(f"the judge's temperature is {judge.cfg.temperature:g}, and the paper's was 0")
    if has_marker:
        found.append("the judge's question contains “<image>”, as in v1.5's code")
    if n_read_otherwise:
        found.append(f"{n_read_otherwise} replies were requested again although the original would accept them "
                     "(judge.reading=original accepts them)")
    if n_unscored:
        found.append(f"unscored questions: {n_unscored}")
    return found
