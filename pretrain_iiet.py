#!/usr/bin/env python
"""Pretrain an IIET or any system it is compared with.

    deepspeed --num_accelerators 2 pretrain_iiet.py --config examples/configs/demo.yaml \
        --ds-config examples/ds_configs/zero1.json [--optimizer.lr 3e-4 …]
"""

from megatron_iiet import signals


def main() -> None:
    """Load the configuration (fast, no torch), then train."""
    with signals.heard():  # before anything slow is imported
        from megatron_iiet.config import exit_with_error, load_config_or_exit

        loaded = load_config_or_exit()
        try:
            from megatron_iiet.training.pretrain import pretrain

            status = pretrain(loaded)
            if status:
                signals.leave(status)
        except (ValueError, FloatingPointError, OSError) as error:
            exit_with_error(str(error))


if __name__ == "__main__":
    main()
