#!/usr/bin/env python
"""Distil a trained model into one with fewer iterations (IIAD): E-IIET, its lower bound, Distil PCformer.

    deepspeed --num_accelerators 2 distill_iiet.py --config examples/configs/distillation/e-iiet-55m.yaml \
        --ds-config examples/ds_configs/zero1.json --teacher runs/iiet-55m --plan plan.json \
        [--distillation.beta 0.5 …]

`--teacher DIR` stands for `--distillation.teacher DIR`, `--plan FILE` for `--solver.iterations FILE`;
all else is as in pretrain_iiet.py.
"""

from megatron_iiet import signals

SHORT = {"--teacher": "--distillation.teacher", "--plan": "--solver.iterations"}


def main() -> None:
    """Load the configuration (fast, no torch), then train."""
    with signals.heard():  # before anything slow is imported
        from megatron_iiet.config import exit_with_error, load_config_or_exit

        loaded = load_config_or_exit(short=SHORT)
        if not loaded.config.distillation.teacher:
            exit_with_error(
                "there is no teacher; give --teacher the folder of a trained model (without one, "
                "pretrain_iiet.py --training.initial_weights goes on training)"
            )
        try:
            from megatron_iiet.training.pretrain import pretrain

            status = pretrain(loaded)
            if status:
                signals.leave(status)
        except (ValueError, FloatingPointError, OSError) as error:
            exit_with_error(str(error))


if __name__ == "__main__":
    main()
