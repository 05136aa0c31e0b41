"""The method: torch, and PEFT only for `LoraConfig` and its file names.

In the order in which they are best read:

    layer.py         h = W0 x + (alpha / r) B A x: the only place that knows A and B
    storage/         how a base layer stores W0, one file a kind
    config.py        which fields of a `LoraConfig` are implemented
    targets.py       which modules it names
    inject.py        LoRA layers into a model, and out again
    interchange.py   an injected model to PEFT's files, and back; load.py does both steps of loading
    merge.py         W0 <- W0 + (alpha / r) B A; numerics.py sums and rounds

`module_to_save.py` and `record.py` are what else an injected model carries. The functions are exported by `plainlora`:
`inject` and `merge` are names of modules here.
"""
