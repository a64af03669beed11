"""The folder of a pipeline or a VAE: a local one, the built-in model's, or one that the hub client fetches."""

from pathlib import Path

from huggingface_hub import snapshot_download

from inpo.common.errors import ModelError

BUILT_IN = ("toyworld/base", "toyworld/flow")
"""The models that are in the package, from any folder; a folder of that name in the working folder wins, as every
folder wins over a name.
"""
CONFIGURATION_FILES = ("*.json", "*/*.json", "*/*.txt", "*/*.jinja", "*/spiece.model")


def folder_of(
    location: str,
    *,
    variant: str | None,
    revision: str | None = None,
    stems: tuple[str, ...] = ("*/model", "*/diffusion_pytorch_model"),
) -> Path:
    """The folder of a model. What has to be fetched is its configuration, and the weights of these names and this
    variant, at `revision` of the repository. Raises ModelError.
    """
    path = Path(location)
    own = [Path(__file__).parents[1] / name for name in BUILT_IN]
    if location in BUILT_IN and not path.exists():
        path = own[BUILT_IN.index(location)]
        location = str(path)
    if path.is_dir():
        return path
    if path in own or path.exists() or location.startswith(("/", ".", "~")) or location.count("/") != 1:
        raise ModelError(
            "There is no model here.",
            where=location,
            expected="a pipeline folder, a hub id like owner/name, or a .safetensors file",
            got="a file" if path.exists() else "nothing",
            fix=f"in the repository, `make toyworld-{path.name}` trains it" if path in own else "check the path",
        )
    tag = f".{variant}" if variant else ""
    # Whole, or in numbered parts.
    weights = [f"{stem}{tag}{part}.safetensors" for stem in stems for part in ("", "-*-of-*")]
    try:
        return Path(
            snapshot_download(
                location,
                revision=revision,
                allow_patterns=[*CONFIGURATION_FILES, *weights],
                ignore_patterns="safety_checker/*",
            )
        )
    except Exception as error:  # the hub client raises many kinds; each means the model could not be fetched
        raise ModelError(
            "The model is not a local folder, and could not be fetched from the hub.",
            where=location,
            got=str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__,
            fix="check the name, the network and HF_HUB_OFFLINE, or download it and pass the folder",
        ) from error


def refuse_local(location: str, revision: str) -> None:
    """Raise ModelError for a model that is on this machine, which a revision says nothing of."""
    if Path(location).exists() or location in BUILT_IN:
        raise ModelError(
            "A model on this machine has no revisions.",
            where=location,
            expected="a hub id like owner/name with --revision",
            got=f"--revision {revision}",
            fix="leave --revision out",
        )


def find_vae(location: str) -> Path:
    """The folder with a VAE's own configuration and weights. Raises ModelError if there is none."""
    # Of a pipeline, or of a repository that is a VAE alone.
    path = folder_of(location, variant=None, stems=("vae/diffusion_pytorch_model", "diffusion_pytorch_model"))
    for folder in (path, path / "vae"):
        if (folder / "config.json").is_file() and list(folder.glob("*.safetensors")):
            return folder
    raise ModelError(
        "There is no VAE here.",
        where=location,
        expected="config.json and *.safetensors, there or in vae/",
        got=", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "an empty folder",
        fix="check --vae",
    )
