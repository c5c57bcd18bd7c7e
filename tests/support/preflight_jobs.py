"""Jobs of a preflight, and rows as a compiler would find them, for tests that compile nothing."""

GIB = 2**30


def row(peak, memory=40, topology="h100-1", rows=16, **changes):
    held = dict(parameters=10 * GIB, optimizer=20 * GIB, gradients=10 * GIB, activations=0, peak=peak * GIB)
    return dict(topology=topology, bytes=held, memory_bytes=memory * GIB, fits=peak <= memory, rows=rows, row_length=8192, micro_batches=2,
                mesh=dict(data=1, fsdp=1, tp=1), warnings=[], **changes)


def job(**changes):
    config = dict(micro_batches=2, batch_size=128, remat="full", optimizer=dict(mu_dtype="float32"),
                  mesh=dict(data=1, fsdp=-1, tp=1, auto=False))
    return dict(topology="h100-1", slices=1, config={**config, "data": dict(packing=True, row_length=8192), **changes})
