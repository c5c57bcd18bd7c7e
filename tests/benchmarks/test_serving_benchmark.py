"""The serving benchmark's own parts: transformers as the server's engine."""

import numpy as np
import pytest
from PIL import Image

from benchmarks import serving


@pytest.mark.slow
def test_transformers_behind_the_routes_gives_our_answers(tmp_path):
    pytest.importorskip("torch", reason="torch's CPU build is not installed")
    import llavamed_jax as lm
    from benchmarks.serving_transformers import served_by_transformers

    path = serving.tiny(tmp_path / "tiny")
    ours, theirs = lm.load(path, dtype="float32"), served_by_transformers(path)
    image = {"type": "image", "image": Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 20, 3), np.uint8))}
    talks = [[{"role": "user", "content": [*more, {"type": "text", "text": text}]}] for more, text in (([image], "What?"), ([], "Why is it so?"))]
    jobs = [theirs.engine.add(theirs.request(talk, 12, 0.0, 1.0, 0, 0)) for talk in talks]
    while not all(job.is_finished for job in jobs):
        theirs.engine.advance()
    answers = ours.generate(talks, max_new_tokens=12)
    assert [job.tokens for job in jobs] == [answer.token_ids for answer in answers] and len({len(job.tokens) for job in jobs} | {12}) == 1
    gone = theirs.engine.add(theirs.request(talks[0], 12, 0.0, 1.0, 0, 0))
    theirs.engine.advance()
    gone.request.cancelled = True
    theirs.engine.advance()
    assert gone.is_finished and len(gone.tokens) == 1
