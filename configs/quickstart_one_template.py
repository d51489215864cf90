"""The quickstart with the same budget and one phrasing per family: what the other phrasings were worth.

python -m itjax.main --config=configs/quickstart_one_template.py
"""

import quickstart
from ml_collections import ConfigDict

from itjax.data.tasks import FAMILIES


def get_config() -> ConfigDict:
    config = quickstart.get_config()
    config.run_dir = "runs/quickstart_one_template"
    for source in config.sources.values():
        source.phrasings = next(template.name for template in FAMILIES[source.task].templates if not template.heldout)
    return config
