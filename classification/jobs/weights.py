"""Are the weights of mimic_settings.sh for the model of a job? train_mimic.sbatch asks before it passes them on.

    python -m jobs.weights FILE CONFIG ARGUMENTS...

FILE: the weights, for the model of CONFIG. ARGUMENTS: those of main.py. Exit status 0 if the job shall start from FILE,
1 if not, with a line that gives the reason; 2 for faulty arguments.
"""

import sys
from argparse import Namespace

import config as config_module
from common.errors import run_command


def architecture(config):
    """What decides which weights fit: two configs of equal ones are of the same model, at any image size."""
    model = config.MODEL
    return {"intern_image": dict(model.INTERN_IMAGE), "timm": model.TIMM.NAME.split(".")[0]}.get(model.TYPE, model.TYPE)


def main(argv):
    file, settings, *arguments = argv
    job = config_module.get_config(config_module.parse_args(arguments))
    if job.MODEL.PRETRAINED or job.MODEL.TIMM.DOWNLOAD:  # weights of its own
        return sys.exit(1)
    if architecture(job) != architecture(config_module.get_config(Namespace(cfg=settings))):
        print(
            f"{file} is not passed on: it is for the model of {settings}, and this job trains "
            f"{config_module.backbone_name(job)}; name the weights of that model with --pretrained"
        )
        sys.exit(1)


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
