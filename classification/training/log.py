"""What the log says of the data and of options without effect, before the work begins."""

import config as config_module
from dataset.mixing import build_mixing
from dataset.sources import parts_of


def log_datasets(log, config, *datasets):
    """What is read, and what its reader warns of."""
    folders = ", ".join(one.DATA.DATA_PATH for one in config_module.source_configs(config).values())
    log.info(f"data in {folders}\n{datasets[0].summary}")
    for warning in dict.fromkeys(text for dataset in datasets for text in dataset.warnings):
        log.warning(warning)


def log_without_effect(log, config, dataset, model, device):
    """Warn of the options that are set and do nothing for this data, any of its sources, this model and this device."""
    if config.DATA.SOURCES and config.DATA.DATA_PATH:
        log.warning(f"DATA.DATA_PATH {config.DATA.DATA_PATH!r} has no effect: DATA.SOURCES names the folders")
    uses = model.uses | build_mixing(config).uses
    by_source = [
        config_module.without_effect(one, part.task, uses | getattr(part, "uses", frozenset()), device.type)
        for one, part in parts_of(dataset, config).values()
    ]
    for key, line in by_source[0].items():
        if all(key in lines for lines in by_source):
            log.warning(line)
