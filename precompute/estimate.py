"""`inpo plan`: what a run would cost, printed."""

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from inpo.common.cache import Manifest
from inpo.common.completeness import check_complete
from inpo.common.console import console
from inpo.common.memory import Need, device_memory
from inpo.common.models import Model
from inpo.common.processes import processes
from inpo.precompute.components import call_blank, compile_denoiser, load_denoiser
from inpo.precompute.configuration import check_ray, configure
from inpo.precompute.inputs import committed_shards, print_inputs
from inpo.precompute.like import all_works
from inpo.precompute.memory import precompute_peak
from inpo.precompute.plan import Plan, check_disk, print_needs, print_plan
from inpo.precompute.settings import PrecomputeSettings, RayOptions


def run_plan(
    recipe: Path | None,
    model_flags: Mapping[str, Any],
    data_flags: Mapping[str, Any],
    flags: Mapping[str, Any],
    *,
    ray_options: RayOptions,
    gpus: int,
    gibibytes: float | None,
    calibrate: bool,
    as_json: bool,
    beside: Callable[[Model, Manifest, int], Sequence[Need]],
) -> int:
    """Print what a run would cost. Returns the exit code: 1 if an input shard is left out, since it cannot be read, or
    since shards of another source's have its name in the cache.

    Args:
        gibibytes: memory of the device that the largest batches are for; None: this machine's GPU.
        beside: what other stages will hold that work on such a cache, whose largest group has so many images.

    Raises StorageError if the disk is too small.
    """
    resolved = configure(recipe, model_flags, data_flags, flags)
    check_ray(resolved.settings, ray_options)
    resolved.data.need("cache")
    model = resolved.model_section.open()
    check_complete(model)
    works, unreadable = all_works(resolved, model, is_real=False)
    documents = []
    for number, work in enumerate(works):
        settings, cache = work.resolved.settings, work.cache
        manifest = work.manifest(model, None)
        committed = committed_shards(cache, manifest)
        work, foreign = work.own(committed)
        unreadable += foreign
        if number == 0 or foreign:
            print_inputs(work.source, work.tasks, unreadable if number == 0 else foreign)
        if not work.tasks:
            continue
        plan = work.plan(committed, manifest, model)
        hours = _calibrated_hours(plan, model, manifest, settings) if calibrate else None
        memory = device_memory(gibibytes)
        own = Need(what="precompute", batch_size=settings.batch_size, peak=precompute_peak(model, manifest))
        sizes = [task.input_shard.group_sizes(task.start, task.stop) for task in work.tasks if manifest.group == "list"]
        widest = max((int(each.max()) for each in sizes), default=2)
        needs = [need.to_json(memory) for need in (own, *beside(model, manifest, widest))]
        bucket = {"bucket": work.title} if work.title else {}
        documents.append(plan.to_json() | {"device_hours": hours, "gpus": gpus, "memory": needs} | bucket)
        if not as_json:
            if work.title:
                print(work.title)
            told = "not measured: --calibrate times the network on the device here"
            if hours is not None:
                told = f"{hours:.3g} (calibrated on this device); {hours / gpus:.3g} h on {gpus}"
            print_plan(plan, console(), hours=told)
            print_needs(needs, manifest.network_dtype, console())
        check_disk(plan, cache)
    if as_json and documents:
        print(json.dumps(documents[0] if resolved.settings.buckets is None else documents, indent=1))
    return 1 if unreadable else 0


def _calibrated_hours(plan: Plan, model: Model, manifest: Manifest, settings: PrecomputeSettings) -> float:
    """Device hours, from the median time of a few full network batches here; VAE and text are not counted."""
    device = processes().device
    denoiser = load_denoiser(model, manifest, device)
    pairs = settings.batch_size or int(PrecomputeSettings.model_fields["batch_size"].default)
    compile_denoiser(denoiser, model, manifest, settings.compile, pairs)
    times = []
    for _ in range(5):
        clock = time.perf_counter()
        call_blank(denoiser, model, manifest, pairs).sum().item()
        times.append(time.perf_counter() - clock)
    return plan.network_calls / (2 * pairs) * statistics.median(times[1:]) / 3600
