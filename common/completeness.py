"""Whether every part of a model is there, before hours of work that need it at their end.

The weights' names and shapes are read from the files' headers and compared with what the configurations ask for, so
that no network has to be in memory for it.
"""

from pathlib import Path

from safetensors import safe_open

from inpo.common.models import Model

Shapes = dict[str, tuple[int, ...]]


def check_complete(model: Model) -> None:
    """Raise ModelError, naming what is missing, if the model's pipeline cannot be put together."""
    for component in model.networks:
        if not _looks_complete(model, component):
            # Names of an older time, which the libraries know, or weights that are not there: loading tells.
            model.load_component(component)
    model.load_pipeline(**dict.fromkeys(model.networks))  # tokenizers and scheduler


def _looks_complete(model: Model, component: str) -> bool:
    in_file = model.in_file(component)
    try:
        asked = _asked_for(model, component, original=in_file)
        files = [model.file] if in_file and model.file is not None else model.weight_files(component)
        held: Shapes = {}
        for file in files:
            held |= _held(file)
    except Exception:  # whatever a damaged file or configuration makes a library raise; loading says it in our words
        return False
    if not in_file:
        asked, held = _without_wrapper(asked), _without_wrapper(held)
    return all(held.get(name) == shape for name, shape in asked.items())


def _asked_for(model: Model, component: str, *, original: bool) -> Shapes:
    network = model.shared_component(component)
    state = network.state_dict()
    if original:
        state = model.family.layout(component, state, network.config)
    return {name: tuple(value.shape) for name, value in state.items()}


def _held(file: Path) -> Shapes:
    with safe_open(file, framework="pt") as weights:
        return {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}


def _without_wrapper(shapes: Shapes) -> Shapes:
    """Some versions of transformers put a text encoder below text_model, some do not."""
    return {name.removeprefix("text_model."): shape for name, shape in shapes.items()}
