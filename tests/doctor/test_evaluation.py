"""What the doctor says an evaluation keeps is what it keeps; others gather every logit (transformers#12878)."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, PreTrainedTokenizerFast
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTConfig

from plainlora.backends import BACKENDS, attach_adapter
from plainlora.settings.arguments import ClassifyConfig
from plainlora.training.metrics import judge_rows, score
from plainlora.training.trainers import AdapterTrainer, ClassifierTrainer
from tests.conftest import BACKBONES, make_model, random_ids

ROWS, LENGTH, CLASSES = 6, 16, 5


class _Kept:
    """Notes what an evaluation had gathered when it was done."""

    output: EvalLoopOutput

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        self.output = super().evaluation_loop(*args, **kwargs)  # type: ignore[misc]
        return self.output


class _Adapter(_Kept, AdapterTrainer):
    pass


class _Classifier(_Kept, ClassifierTrainer):
    pass


def test_u19_a_language_models_evaluation_keeps_the_loss_alone(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    ids = random_ids(ROWS, LENGTH).tolist()
    rows = Dataset.from_dict({"input_ids": ids, "labels": ids})
    for name in ("fused", "reference"):
        backend = BACKENDS[name]
        model = attach_adapter(make_model("llama"), LoraConfig(target_modules="all-linear", r=2), backend)
        arguments = SFTConfig(
            output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_length=None,
            gradient_checkpointing=False, disable_tqdm=True,
        )  # fmt: skip
        trainer = _Adapter(
            model, backend, args=arguments, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer
        )
        assert trainer.evaluate()["eval_loss"] > 0
        assert trainer.output.predictions is None
        assert trainer.output.label_ids is None


def test_u19_a_classifiers_evaluation_keeps_a_class_and_a_loss_a_row(
    tmp_path: Path, word_tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = Dataset.from_dict({"input_ids": random_ids(ROWS, LENGTH).tolist(), "labels": [*range(CLASSES), 0]})
    torch.manual_seed(0)
    config = BACKBONES["bert"]()
    config.num_labels = CLASSES
    trainer = _Classifier(
        AutoModelForSequenceClassification.from_config(config), None,
        args=ClassifyConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True),
        train_dataset=rows, eval_dataset=rows, processing_class=word_tokenizer,
        data_collator=DataCollatorWithPadding(word_tokenizer), compute_metrics=partial(score, classes=CLASSES),
        preprocess_logits_for_metrics=judge_rows,
    )  # fmt: skip
    trainer.evaluate()
    assert trainer.output.predictions.shape == (ROWS, 2)
