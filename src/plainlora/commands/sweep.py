"""`plainlora sweep`: searches for better hyperparameters."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    parser.add_argument(
        "--config", required=True, metavar="YAML", help="a recipe of recipes/sft.py or recipes/classify.py"
    )
    parser.add_argument("--trials", type=int, default=20, help="number of finished trials to reach (default: 20)")
    parser.add_argument(
        "--search",
        nargs="+",
        action="extend",
        metavar="NAME=SPEC",
        help="what to search instead of the method's default: learning_rate=1e-5..1e-3, lora_r='4|8|16', "
        "num_train_epochs=2..5, lora_target_modules='all-linear|q_proj,v_proj'",
    )
    parser.add_argument("--output_dir", help="default: outputs/<folder>-<name>-sweep; an existing sweep is continued")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the sampler (default: 0); of the runs: -- --seed N"
    )
    parser.add_argument("--metric", help="default: validation_accuracy of a classifier, eval_loss of a language model")
    parser.add_argument("flags", nargs="*", metavar="-- FLAG", help="as for the recipe's program, for every trial")


def run(arguments: argparse.Namespace) -> None:
    """Runs the missing trials, then prints and writes the results."""
    import plainlora.quiet  # noqa: F401
    from plainlora.experiments.sweep import sweep

    sweep(
        arguments.config,
        arguments.trials,
        arguments.search,
        arguments.output_dir,
        arguments.seed,
        arguments.metric,
        arguments.flags,
    )
