# What all rules share: settings, paths, the frozen run, and the effective limits.
import sys
from contextlib import ExitStack

from snakemake.exceptions import WorkflowError

sys.path.insert(0, str(Path(workflow.current_basedir.get_path_or_uri(secret_free=True)).parent / "scripts"))

from cuepoint import devices, faults, runs, scheduling, slurm
from cuepoint.layout import Layout
from cuepoint.live import LiveProgress
from cuepoint.plan import read_run
from cuepoint.settings import load_settings


def or_stop(function, *args, **kwargs):
    """Call a library function; a known error stops the workflow with its message instead of a traceback."""
    try:
        return function(*args, **kwargs)
    except Exception as error:
        if (message := faults.message_for(error)) is None:
            raise
        raise WorkflowError(message) from None


SETTINGS = or_stop(load_settings, config)
LAYOUT = Layout(SETTINGS.results)
if workflow.is_main_process and not workflow.output_settings.dryrun:
    or_stop(runs.check_place, LAYOUT)
    # SLURM jobs that a killed run left behind end first: the plan is made from what they leave.
    or_stop(slurm.settle_orphans, LAYOUT, SETTINGS.slurm.orphans)
# The main process plans the run; nested ones (each SLURM job parses this file again) read what it wrote.
DRAFT = or_stop(runs.draft, SETTINGS, LAYOUT) if workflow.is_main_process else None
RUN = DRAFT.run if DRAFT else or_stop(read_run, LAYOUT)
SHARDS = RUN.shards()
GPUS = devices.count()

# A profile's or the command line's --resources win; without a limit Snakemake would ignore these resources.
workflow.global_resources.setdefault("gpu", max(GPUS, 1))
workflow.global_resources.setdefault("downloads", SETTINGS.download.parallel)


wildcard_constraints:
    video_id="[A-Za-z0-9_-]+",
    shard="[0-9]+",
    model="[A-Za-z0-9][A-Za-z0-9._-]*",


def get_receipts(wildcards):
    """Receipts of a shard's videos, or of all of them."""
    videos = SHARDS[wildcards.shard] if hasattr(wildcards, "shard") else RUN.members
    return [str(LAYOUT.receipt(video_id)) for video_id in videos]


def get_transcripts(wildcards):
    return [str(LAYOUT.transcripts(shard)) for shard in SHARDS]


def get_videos(wildcards):
    return [str(LAYOUT.videos(shard)) for shard in SHARDS]


def get_embeddings(wildcards):
    """Embeddings of all shards with one model, or with all models in use."""
    models = [wildcards.model] if hasattr(wildcards, "model") else SETTINGS.embedding.use
    return [str(LAYOUT.embeddings(model, shard)) for model in models for shard in SHARDS]


def get_transcript_of(wildcards):
    """The transcript of the shard that a video is in."""
    if wildcards.video_id not in RUN.members:
        raise WorkflowError(f"{wildcards.video_id} is not in {SETTINGS.videos}: add it there and run snakemake first")
    return str(LAYOUT.transcripts(RUN.members[wildcards.video_id]))


def get_load_receipts(wildcards):
    return [str(LAYOUT.load_receipt(f"{SETTINGS.qdrant.collection}-{model}")) for model in SETTINGS.embedding.use]


def get_gpu_job_threads(wildcards):
    """Cores of a GPU job: its share of the run's cores; all of them without a GPU, so that one runs at a time."""
    cores = workflow.cores or 1
    return max(1, cores // int(workflow.global_resources["gpu"].value)) if GPUS else cores


def get_transcribe_minutes(wildcards, input, attempt):
    """Run time that a SLURM job asks for, from the audio that the shard's receipts tell of."""
    return slurm.transcribe_minutes(
        slurm.audio_lengths(input.receipts), SETTINGS.transcribe, attempt, SETTINGS.slurm.audio_speed
    )


def get_transcribe_memory(wildcards, input, attempt):
    """Memory (MB) that a SLURM job asks for, from the audio that the shard's receipts tell of."""
    return slurm.transcribe_memory(slurm.audio_lengths(input.receipts), SETTINGS.transcribe, attempt)


_held = ExitStack()
PROGRESS = LiveProgress(LAYOUT, SETTINGS, RUN)


onstart:
    # Dry runs and nested processes do not come here. The lock ends with this process, however it ends.
    or_stop(_held.enter_context, runs.locked(LAYOUT, workflow.dag_settings.targets))
    or_stop(slurm.prepare_executor, workflow.scheduler._executor, LAYOUT, SETTINGS)
    runs.stop_on_sigterm(workflow.scheduler.exit_gracefully)
    or_stop(runs.begin, DRAFT, LAYOUT, workflow.dag_settings.targets)
    scheduling.show_few(workflow.scheduler)
    if not (workflow.output_settings.quiet or workflow.output_settings.verbose):
        PROGRESS.start()


onsuccess:
    PROGRESS.stop()
    or_stop(runs.end, SETTINGS, LAYOUT, RUN)


onerror:
    PROGRESS.stop()
    or_stop(runs.end, SETTINGS, LAYOUT, RUN)
