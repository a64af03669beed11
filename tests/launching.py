"""How tests start `inpo` in several processes."""

import sys


def launch(*arguments: str, processes: int = 2) -> list[str]:
    """The command line of `accelerate launch -m inpo ...`.

    --multi_gpu starts so many processes, with gloo where there is no GPU; --cpu would start one.
    """
    options = ["--multi_gpu", "--num_processes", str(processes), "--num_machines", "1", "--mixed_precision", "no"]
    options += ["--dynamo_backend", "no", "--main_process_port", "0"]
    return [sys.executable, "-m", "accelerate.commands.launch", *options, "-m", "inpo", *arguments]
