"""Reads data sets. A data set is one file, which makes a `registry.DataSet`, and one line here, which registers it."""

from llavamed_jax.datasets import (
    captions,
    choices,
    hub_rows,
    iu_xray,
    llava_med,
    medframeqa,
    medxpertqa,
    mmmu_med,
    omnimedvqa,
    pathvqa,
    pmc_vqa,
    slake,
    vqa_rad,
)
from llavamed_jax.datasets.registry import keep_names, register

register(vqa_rad.DATA_SET)
register(slake.DATA_SET)
register(pathvqa.DATA_SET)
register(llava_med.DATA_SET)
register(pmc_vqa.DATA_SET)
register(omnimedvqa.DATA_SET)
register(medxpertqa.DATA_SET)  # before `choices`, whose rows have options too
register(mmmu_med.DATA_SET)
register(medframeqa.DATA_SET)
register(choices.DATA_SET)
register(iu_xray.DATA_SET)  # before `captions`, whose rows have a report too
register(captions.DATA_SET)
register(hub_rows.DATA_SET)
keep_names()  # of the sets above: a user's set cannot take their place
