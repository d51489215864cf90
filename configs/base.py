"""Every setting with its default (itjax/base/schema.py says what each one means); experiments import this and change what differs.

    from configs import base    # or, beside this file: see quickstart.py
"""

from ml_collections import config_dict

from itjax.base import freeze, schema


def get_config() -> config_dict.ConfigDict:
    return freeze.thaw(schema.Run())


def source(**settings) -> config_dict.ConfigDict:
    """One entry of `config.sources`: `source(files="data/*.jsonl", weight=2.0)` or `source(task="triage", examples=5000)`."""
    return freeze.thaw(schema.Source(**settings))
