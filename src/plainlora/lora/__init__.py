"""The method: torch, and PEFT only for `LoraConfig` and its file names.

Best read in this order:

    layer.py         h = W0 x + (alpha / r) B A x: what A and B compute
    dora.py          DoRA, a variant of it
    storage/         how a base layer stores W0, one file a kind
    config.py        which fields of a `LoraConfig` are implemented
    targets.py       which modules it selects
    inject.py        puts LoRA layers into a model, and takes them out again
    interchange.py   writes an injected model as PEFT's files, and reads them; load.py injects and reads
    merge.py         W0 <- W0 + (alpha / r) B A; numerics.py sums and rounds

An injected model also carries modules trained whole (`module_to_save.py`) and a record of its injection (`record.py`).
Import the functions from `plainlora`: here `inject` and `merge` are modules.
"""
