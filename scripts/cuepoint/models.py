"""The models of a run, fetched by one process before many jobs want them at the same time."""

import logging

from cuepoint.errors import CuepointError
from cuepoint.layout import Layout
from cuepoint.locks import hold
from cuepoint.settings import Settings

log = logging.getLogger("snakemake.logging")


def fetch_models(settings: Settings, layout: Layout) -> None:
    """Download into the Hugging Face cache what it lacks of the run's models; those in directories stay there.

    What cannot be had from here (no network, a package that only the jobs' environment holds) is said and left to the
    jobs: the hub client's own file locks let one of them download and the others wait.
    """
    try:
        from cuepoint.asr import model as speech
        from cuepoint.embedding import location as embedding

        with hold(layout.lock("model", "fetch"), "the download of the models"):
            speech.fetch(settings.transcribe)
            for name in settings.embedding.use:
                embedding.fetch(settings.embedding.models[name])
    except (CuepointError, ImportError) as error:
        log.warning(f"the models are not fetched here and now, the jobs will try: {error}")
