"""What linears cost in each form, where forms are chosen by milliseconds: measured once, on the dense model's."""

from __future__ import annotations

from ziplm_deploy.artifacts import content_key
from ziplm_deploy.compression.int8.linear_times import LinearTimes, linear_shapes, time_linears
from ziplm_deploy.compression.int8.settings import Int8Settings
from ziplm_deploy.engines import get_engine
from ziplm_deploy.machine.info import machine_info
from ziplm_deploy.run.run import Run


def linear_times(run: Run, settings: Int8Settings) -> LinearTimes:
    """Milliseconds of every form on this machine; a stage, which writes ``compression/linear-times.json``."""
    path, environment = run.folder.linear_times, run.recipe.environment
    shapes = linear_shapes(run.dense_member.as_exported.path)
    key = content_key(
        shapes=shapes,
        environment=environment.fingerprint,
        engine=get_engine(environment.engine).version(),
        machine=machine_info().fingerprint,
        per_channel=settings.config.per_channel,
        weight_limit=settings.weight_limit,
    )

    def work() -> None:
        progress = run.progress
        found = time_linears(shapes, environment, settings, progress=progress.step, note=progress.note)
        found.save(path)

    run.folder.make("time linears", key, [path], work)
    return LinearTimes.load(path)
