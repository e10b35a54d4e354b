"""Where everything is kept below the results directory: the one place that spells directory names."""

import hashlib
from dataclasses import dataclass
from pathlib import Path


def prefix(video_id: str) -> str:
    """Two hex digits that spread videos over 256 directories (100,000 videos: about 400 entries each)."""
    return hashlib.blake2s(video_id.encode(), digest_size=1).hexdigest()


@dataclass(frozen=True)
class Layout:
    """Paths of one results directory. Products are outside `.state`; what a run must remember is inside it."""

    results: Path

    def receipt(self, video_id: str) -> Path:
        """How the video's download ended (JSON)."""
        return self.results / "audio" / prefix(video_id) / f"{video_id}.json"

    def audio(self, video_id: str) -> Path:
        """The audio track, remuxed and not re-encoded (Matroska)."""
        return self.results / "audio" / prefix(video_id) / f"{video_id}.mka"

    def transcripts(self, shard: str) -> Path:
        """One row a segment."""
        return self.results / "transcripts" / f"{shard}.parquet"

    def videos(self, shard: str) -> Path:
        """One row a video."""
        return self.results / "videos" / f"{shard}.parquet"

    def embeddings(self, model: str, shard: str) -> Path:
        """One row a chunk."""
        return self.results / "embeddings" / model / f"{shard}.parquet"

    def load_receipt(self, collection: str) -> Path:
        """What was loaded into a collection and verified there (JSON)."""
        return self.results / "qdrant" / f"{collection}.json"

    @property
    def report(self) -> Path:
        """Directory of the ledger and the report."""
        return self.results / "report"

    @property
    def logs(self) -> Path:
        """Directory of the jobs' logs, one folder a rule."""
        return self.results / "logs"

    @property
    def telemetry(self) -> Path:
        """Directory of what jobs measured while they ran, one folder a rule."""
        return self.results / "telemetry"

    @property
    def state(self) -> Path:
        """What a run must remember: plan, failure log, caches, locks, limiter."""
        return self.results / ".state"

    @property
    def plan(self) -> Path:
        """The append-only table video -> shard."""
        return self.state / "plan.tsv"

    @property
    def run(self) -> Path:
        """The frozen plan of the current run: what nested Snakemake processes read."""
        return self.state / "run.json"

    def failures(self, video_id: str) -> Path:
        """The video's failure log."""
        return self.state / "failures" / prefix(video_id) / f"{video_id}.jsonl"

    def cache(self, stage: str, video_id: str, fingerprint: str, suffix: str) -> Path:
        """A per-video result under the fingerprint of all that it depends on."""
        return self.state / "cache" / stage / prefix(video_id) / f"{video_id}.{fingerprint}{suffix}"

    def partial(self, video_id: str) -> Path:
        """Directory of a download that has not ended yet: what another try, or another run, goes on from."""
        return self.state / "partial" / prefix(video_id) / video_id

    def exported_model(self, fingerprint: str) -> Path:
        """Directory of an embedding model in the form that a backend runs."""
        return self.state / "cache" / "models" / fingerprint

    def lock(self, kind: str, name: str) -> Path:
        """The lock file of one thing of a kind (run, video, shard, model, collection)."""
        folder = self.state / "locks" / kind
        return (folder / prefix(name) if kind in {"video", "shard"} else folder) / f"{name}.lock"

    @property
    def throttle(self) -> Path:
        """Directory of the per-host limiter and circuit, shared by all jobs of a run."""
        return self.state / "throttle"

    @property
    def refusals(self) -> Path:
        """How many runs have failed because of `max_failed_share`."""
        return self.state / "refusals"

    @property
    def slurm_runs(self) -> Path:
        """Names of the SLURM jobs of runs that may have been killed, one a line."""
        return self.state / "slurm-runs"
