"""Initial values that are computed from training rows: those of CorDA, LoRA-GA and EVA."""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import cycle, islice
from typing import cast

import torch
from peft import EvaConfig, LoraConfig, PeftModel
from peft.tuners.lora.eva import prepare_model_inputs_fn_language_modeling as tokens_for_eva
from tqdm import tqdm
from transformers import PreTrainedModel

from plainlora.errors import UserError
from plainlora.lora.errors import LoRAError
from plainlora.lora.targets import condense
from plainlora.peft_model.config import init_of

# SmolLM2-135M converged in 73 batches of 2 rows for r=16, in 273 of one row for r=32; on 4 rows not in 64 of 2.
MOST_BATCHES = 512


def prepare(
    model: PreTrainedModel, config: LoraConfig, selected: list[str], batches: Sequence[dict[str, torch.Tensor]]
) -> None:
    """Computes what CorDA and LoRA-GA need before they are attached; both look for targets by their names.

    Raises:
        LoRAError: There are no rows.
        UserError: A package that PEFT's CorDA needs is missing.

    https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/lora/corda.py
    https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/lora/loraga.py
    """
    if not batches:
        raise LoRAError(
            f"init_lora_weights={config.init_lora_weights!r} computes the adapter from training rows: train it "
            "with recipes/sft.py or recipes/classify.py"
        )
    config.target_modules = condense(selected, model)
    if init_of(config) == "corda":
        try:
            from peft.tuners.lora.corda import preprocess_corda  # noqa: PLC0415
        except ModuleNotFoundError as error:
            raise UserError(
                f"init_lora_weights='corda': PEFT's CorDA needs the package {error.name}: pip install attrs"
            ) from error
        was_training = model.training
        preprocess_corda(model.eval(), config, run_model=partial(_run_rows, model, batches))
        model.train(was_training)
    elif init_of(config) == "lora_ga":
        from peft.tuners.lora.loraga import preprocess_loraga  # noqa: PLC0415

        preprocess_loraga(model, config, partial(_accumulate_gradients, model, batches))


def _with_progress(batches: Sequence[dict[str, torch.Tensor]]) -> Iterable[dict[str, torch.Tensor]]:
    return tqdm(batches, desc="initial values from rows", leave=False)


@torch.no_grad()
def _run_rows(model: PreTrainedModel, batches: Sequence[dict[str, torch.Tensor]]) -> None:
    """One row at a time and unpadded: CorDA's covariances are those of one sequence, padding included."""
    for batch in _with_progress(batches):
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            model(input_ids=ids[mask.bool()][None].to(model.device))


def _accumulate_gradients(model: PreTrainedModel, batches: Sequence[dict[str, torch.Tensor]]) -> None:
    for batch in _with_progress(batches):
        model(**{name: value.to(model.device) for name, value in batch.items()}).loss.backward()


def initialize_eva(adapted: PeftModel, batches: Sequence[dict[str, torch.Tensor]]) -> None:
    """`peft.initialize_lora_eva_weights` on an attached adapter.

    Raises:
        LoRAError: No batch has enough tokens, or the components do not converge.
    """
    from peft import initialize_lora_eva_weights  # noqa: PLC0415

    on_device = [
        {name: value.to(adapted.device) for name, value in batch.items()} for batch in _for_eva(adapted, batches)
    ]
    initialize_lora_eva_weights(adapted, _UntilConverged(on_device))


class _UntilConverged:
    """Batches again and again, at most `MOST_BATCHES`: PEFT's EVA goes through them until every layer has converged.

    A few rows, an expert that few tokens reach, or `tau` too near 1 would keep it for ever.
    """

    def __init__(self, batches: Sequence[dict[str, torch.Tensor]]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        yield from islice(cycle(self.batches), MOST_BATCHES)
        raise LoRAError(
            f"init_lora_weights='eva' has not converged in {MOST_BATCHES} batches; give more rows, or lower r, or tau "
            "in eva_config"
        )


def _for_eva(adapted: PeftModel, batches: Sequence[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
    """The batches that PEFT's EVA can use, without labels of whole rows, which it would take for those of tokens.

    It passes over a batch with fewer tokens than components, prints a line a layer, and has no end if all are such.
    https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/lora/eva.py (`SVDHook`, `_get_eva_state_dict`)

    Raises:
        LoRAError: There is none.
    """
    config = cast(LoraConfig, adapted.active_peft_config)
    eva = cast(EvaConfig, config.eva_config)
    components = round(max([config.r, *(config.rank_pattern or {}).values()]) * eva.rho)
    of_tokens = [
        {name: value for name, value in batch.items() if name != "labels" or value.dim() > 1} for batch in batches
    ]
    sizes = [len(tokens_for_eva(batch, config)) for batch in of_tokens]
    if max(sizes) < components:
        raise LoRAError(
            f"init_lora_weights='eva' computes {components} components (r times rho), and no batch of training rows "
            f"has more than {max(sizes)} trained tokens; raise per_device_train_batch_size, or lower r"
        )
    return [batch for batch, size in zip(of_tokens, sizes, strict=True) if size >= components]
