"""Collections on a Qdrant server, through qdrant-client."""

import logging
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from itertools import islice
from typing import Any

import grpc
from qdrant_client import QdrantClient, models
from qdrant_client.common.client_exceptions import ResourceExhaustedResponse
from qdrant_client.http.exceptions import ApiException, ResponseHandlingException, UnexpectedResponse
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from cuepoint.errors import CuepointError, DataError, EnvironmentFault
from cuepoint.qdrant import is_version_of
from cuepoint.qdrant.collection import DATETIME_INDEXES, KEYWORD_INDEXES, Filters, Hit, Shape
from cuepoint.qdrant.points import Points
from cuepoint.settings import QdrantSettings

log = logging.getLogger(__name__)

OLDEST = (1, 12)  # of servers: the first that counts points by value (facets)
QUICK = 5  # seconds for a question that must not hold up the start of a run
NO_LIMIT = 2**31
PAGE = 1000  # points that are read at a time to count them
INDEX_POLL = 1.0  # seconds
INDEX_SETTLED = 3  # polls in a row without change: just after indexing is switched on a server still says it is done
INDEX_PATIENCE = 600  # polls without progress after which the index is left to grow by itself

_BACK_OFF = wait_random_exponential(max=30)
_Errors = (grpc.RpcError, ApiException, ResourceExhaustedResponse)


@dataclass(frozen=True)
class Limits:
    """What one request may ask of a collection: a server in strict mode refuses more."""

    read: int = NO_LIMIT  # points or values in an answer
    write: int = NO_LIMIT  # points in an upload
    condition: int = NO_LIMIT  # values in a condition of a filter
    exact: bool = True  # requests that bypass the index or count exactly


def _limits(strict: models.StrictModeConfig | None) -> Limits:
    if strict is None or not strict.enabled:
        return Limits()
    return Limits(
        read=strict.max_query_limit or NO_LIMIT,
        write=strict.upsert_max_batchsize or NO_LIMIT,
        condition=strict.condition_max_size or NO_LIMIT,
        exact=strict.search_allow_exact is not False,
    )


class ServerCollection:
    """One collection of a server."""

    def __init__(self, server: "ServerStore", name: str, limits: Limits | None = None):
        self._ask = server.ask
        self._client = server.client
        self._name = name
        self._limits = limits or Limits()

    def provenance(self) -> dict[str, Any]:
        """What the collection was made with; servers before 1.16 do not keep it."""
        metadata = self._ask(self._client.get_collection, self._name).config.metadata
        return dict((metadata or {}).get("cuepoint", {}))

    def count(self) -> int:
        """Exact number of points."""
        if self._limits.exact:
            return self._ask(self._client.count, self._name, exact=True).count
        return sum(1 for _ in self._scroll(with_payload=False))

    def counts(self, key: str) -> dict[str, int]:
        """Exact number of points for each value of an indexed payload key."""
        limit = max(1, self.count())  # there cannot be more values than points
        if self._limits.exact and limit <= self._limits.read:
            found = self._ask(self._client.facet, self._name, key, limit=limit, exact=True)
            return {str(hit.value): hit.count for hit in found.hits}
        payloads = (record.payload or {} for record in self._scroll(with_payload=[key]))
        return dict(Counter(str(payload[key]) for payload in payloads if key in payload))

    def upsert(self, points: Points) -> None:
        """Write points, replacing those with the same IDs; they are in the collection on return."""
        self._ask(
            self._client.upload_collection,
            self._name,
            vectors=points.vectors,
            payload=points.payloads,
            ids=points.ids,
            batch_size=min(len(points.ids), self._limits.write),
            max_retries=0,  # `ask` tries again
            wait=True,
        )

    def trim(self, fingerprints: Mapping[str, str]) -> None:
        """Delete what these videos hold under any other fingerprint."""
        for videos in self._named_at_once(fingerprints):
            kept = [fingerprints[video_id] for video_id in videos]
            self._delete(models.Filter(must=[_among("video_id", videos)], must_not=[_among("fingerprint", kept)]))

    def delete_videos(self, video_ids: Sequence[str]) -> None:
        """Delete all points of these videos."""
        for videos in self._named_at_once(video_ids):
            self._delete(models.Filter(must=[_among("video_id", videos)]))

    def retrieve(self, ids: Sequence[str]) -> list[Hit]:
        """Points with vector and payload."""
        records = self._ask(self._client.retrieve, self._name, ids=list(ids), with_payload=True, with_vectors=True)
        return [Hit(str(record.id), dict(record.payload or {}), vector=record.vector) for record in records]

    def search(
        self, vector: Sequence[float], limit: int, filters: Filters | None = None, *, exact: bool = False
    ) -> list[Hit]:
        """The points nearest to a vector, best first."""
        response = self._ask(
            self._client.query_points,
            self._name,
            query=list(vector),
            limit=min(limit, self._limits.read),
            query_filter=_filter(filters or Filters()),
            search_params=models.SearchParams(exact=exact and self._limits.exact),
            with_payload=True,
        )
        return [Hit(str(hit.id), dict(hit.payload or {}), hit.score) for hit in response.points]

    def _delete(self, selection: models.Filter) -> None:
        selector = models.FilterSelector(filter=selection)
        self._ask(self._client.delete, self._name, points_selector=selector, wait=True)

    def _named_at_once(self, video_ids: Iterable[str]) -> Iterator[list[str]]:
        rest = iter(video_ids)
        while batch := list(islice(rest, self._limits.condition)):
            yield batch

    def _scroll(self, **what: Any) -> Iterator[models.Record]:
        """All points, a page at a time."""
        page = min(PAGE, self._limits.read)
        offset = None
        while True:
            records, offset = self._ask(self._client.scroll, self._name, limit=page, offset=offset, **what)
            yield from records
            if offset is None:
                return


class ServerStore:
    """A server, or qdrant-client's local mode, which has the same calls."""

    def __init__(self, client: QdrantClient, settings: QdrantSettings):
        self.client = client
        self._settings = settings

    def ask(self, request: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """Make a request, again with back-off while the server is out of reach or busy; errors become one message."""
        attempts = Retrying(
            stop=stop_after_attempt(self._settings.attempts),
            wait=_pause,
            retry=retry_if_exception(_may_pass),
            before_sleep=_log_retry,
            reraise=True,
        )
        try:
            return attempts(request, *arguments, **named)
        except _Errors as error:
            raise _explained(error, self._settings) from error

    def published(self, name: str) -> str | None:
        """Collection that an alias stands for."""
        return self._aliases().get(name)

    @contextmanager
    def read(self, collection: str) -> Iterator[ServerCollection | None]:
        """An existing collection."""
        yield self._open(collection) if self.ask(self.client.collection_exists, collection) else None

    @contextmanager
    def write(self, shape: Shape, *, adding: int = 0, deleting: int = 0, whole: int = 0) -> Iterator[ServerCollection]:
        """The collection, made with its payload indexes if there is none. Readers see each batch as it is written."""
        self._check_version()
        if not self.ask(self.client.collection_exists, shape.name):
            self._create(shape)
        self._check_shape(shape)
        self._create_payload_indexes(shape.name)
        yield self._open(shape.name)

    def publish(self, names: Sequence[str], collection: str) -> None:
        """Let the server build its index as the settings say, wait for it, then move all aliases in one call."""
        self._tune(collection)
        self._wait_for_index(collection)
        aliases = self._aliases()
        operations: list[Any] = []
        for name in names:
            if aliases.get(name) == collection:
                continue
            if name in aliases:
                operations.append(models.DeleteAliasOperation(delete_alias=models.DeleteAlias(alias_name=name)))
            create = models.CreateAlias(collection_name=collection, alias_name=name)
            operations.append(models.CreateAliasOperation(create_alias=create))
        if operations:
            self.ask(self.client.update_collection_aliases, operations)

    def drop_previous(self, name: str, *, others: bool) -> list[str]:
        """With `others`, delete earlier collections of a published name that no alias stands for."""
        if not others:
            return []
        in_use = set(self._aliases().values())
        existing = [each.name for each in self.ask(self.client.get_collections).collections]
        dropped = [each for each in existing if is_version_of(name, each) and each not in in_use]
        for each in dropped:
            self.ask(self.client.delete_collection, each)
        return dropped

    def _open(self, name: str) -> ServerCollection:
        return ServerCollection(
            self, name, _limits(self.ask(self.client.get_collection, name).config.strict_mode_config)
        )

    def _aliases(self) -> dict[str, str]:
        return {each.alias_name: each.collection_name for each in self.ask(self.client.get_aliases).aliases}

    def _check_version(self) -> None:
        version = self.ask(self.client.info).version
        if tuple(int(part) for part in version.split("-")[0].split(".")[:2]) < OLDEST:
            raise EnvironmentFault(
                f"the Qdrant server at {self._settings.location} has version {version}: "
                f"{'.'.join(map(str, OLDEST))} or newer is needed"
            )

    def _create(self, shape: Shape) -> None:
        settings = self._settings
        self.ask(
            self.client.create_collection,
            shape.name,
            vectors_config=models.VectorParams(
                size=shape.dimension,
                distance=models.Distance(shape.distance),
                on_disk=settings.vectors_on_disk,
            ),
            hnsw_config=self._hnsw(),
            quantization_config=_quantization(settings.quantization),
            # An index that is built once all points are there costs less than one that grows with them.
            optimizers_config=models.OptimizersConfigDiff(indexing_threshold=0),
            on_disk_payload=settings.payload_on_disk,
            shard_number=settings.shard_number,
            replication_factor=settings.replication_factor,
            metadata={"cuepoint": shape.provenance},
        )

    def _check_shape(self, shape: Shape) -> None:
        vectors = self.ask(self.client.get_collection, shape.name).config.params.vectors
        found = (vectors.size, vectors.distance.value) if isinstance(vectors, models.VectorParams) else (None, None)
        if found != (shape.dimension, shape.distance):
            raise DataError(
                f"collection {shape.name} at {self._settings.location} is for vectors of {found[0]} dimensions by "
                f"{found[1]}, not {shape.dimension} by {shape.distance}: something else made it; delete or rename it, "
                "or set another qdrant.collection"
            )

    def _create_payload_indexes(self, name: str) -> None:
        existing = self.ask(self.client.get_collection, name).payload_schema
        kinds = dict.fromkeys(KEYWORD_INDEXES, models.PayloadSchemaType.KEYWORD)
        kinds |= dict.fromkeys(DATETIME_INDEXES, models.PayloadSchemaType.DATETIME)
        for key, kind in kinds.items():
            if key not in existing:
                self.ask(self.client.create_payload_index, name, key, field_schema=kind, wait=True)

    def _hnsw(self) -> models.HnswConfigDiff:
        return models.HnswConfigDiff(m=self._settings.hnsw_m, ef_construct=self._settings.hnsw_ef_construct)

    def _tune(self, name: str) -> None:
        settings = self._settings
        self.ask(
            self.client.update_collection,
            name,
            vectors_config={"": models.VectorParamsDiff(on_disk=settings.vectors_on_disk)},
            hnsw_config=self._hnsw(),
            quantization_config=_quantization(settings.quantization) or models.Disabled.DISABLED,
            optimizers_config=models.OptimizersConfigDiff(indexing_threshold=settings.indexing_threshold),
            collection_params=models.CollectionParamsDiff(on_disk_payload=settings.payload_on_disk),
        )

    def _wait_for_index(self, name: str) -> None:
        """Return when the server has been green, with the same number of indexed vectors, for a few polls."""
        before, settled, stalled = -1, 0, 0
        while True:
            info = self.ask(self.client.get_collection, name)
            if info.status == models.CollectionStatus.RED or info.optimizer_status != models.OptimizersStatusOneOf.OK:
                raise EnvironmentFault(
                    f"the Qdrant server at {self._settings.location} cannot index {name}: {info.optimizer_status}"
                )
            indexed = info.indexed_vectors_count or 0
            same = indexed == before
            settled = settled + 1 if same and info.status == models.CollectionStatus.GREEN else 0
            stalled = stalled + 1 if same else 0
            if settled >= INDEX_SETTLED or not self._indexes(info):
                return
            if stalled >= INDEX_PATIENCE:
                log.warning("%s: %d vectors are indexed, the others are searched one by one until then", name, indexed)
                return
            before = indexed
            time.sleep(INDEX_POLL)

    def _indexes(self, info: models.CollectionInfo) -> bool:
        """Whether the collection is large enough for the server to build anything."""
        vectors = info.config.params.vectors
        kilobytes = (
            (info.points_count or 0) * 4 * vectors.size / 1024 if isinstance(vectors, models.VectorParams) else 0
        )
        return 0 < self._settings.indexing_threshold <= kilobytes


def connect(settings: QdrantSettings, timeout: float | None = None) -> QdrantClient:
    """A client for the server in the settings; it connects with the first request."""
    return QdrantClient(
        url=settings.location,
        grpc_port=settings.grpc_port,
        prefer_grpc=settings.prefer_grpc,
        api_key=os.environ.get(settings.api_key_env) or None,
        timeout=math.ceil(timeout or settings.timeout),
        check_compatibility=False,  # a request of its own; the store looks at the version itself
    )


def is_published(name: str, settings: QdrantSettings) -> bool:
    """Whether a server has the alias; True, with a line in the log, when it does not answer at once."""
    quick = settings.model_copy(update={"attempts": 1})
    try:
        return ServerStore(connect(quick, timeout=QUICK), quick).published(name) is not None
    except CuepointError as error:
        log.warning("cannot see whether %s is loaded: %s", name, error)
        return True


def _among(key: str, values: list[str]) -> models.FieldCondition:
    return models.FieldCondition(key=key, match=models.MatchAny(any=values))


def _filter(filters: Filters) -> models.Filter | None:
    conditions: list[Any] = []
    if filters.video:
        conditions.append(_among("video_id", [filters.video]))
    if filters.language:
        conditions.append(_among("language", [filters.language]))
    if filters.channel:
        either = [_among("channel", [filters.channel]), _among("channel_id", [filters.channel])]
        conditions.append(models.Filter(should=either))
    if filters.since or filters.until:
        days = models.DatetimeRange(gte=filters.since, lte=filters.until)
        conditions.append(models.FieldCondition(key="upload_date", range=days))
    return models.Filter(must=conditions) if conditions else None


def _quantization(kind: str) -> models.ScalarQuantization | models.BinaryQuantization | None:
    match kind:
        case "scalar":
            scalar = models.ScalarQuantizationConfig(type=models.ScalarType.INT8, quantile=0.99, always_ram=True)
            return models.ScalarQuantization(scalar=scalar)
        case "binary":
            return models.BinaryQuantization(binary=models.BinaryQuantizationConfig(always_ram=True))
        case _:
            return None


_HTTP = {
    HTTPStatus.UNAUTHORIZED: "UNAUTHENTICATED",
    HTTPStatus.FORBIDDEN: "UNAUTHENTICATED",
    HTTPStatus.REQUEST_TIMEOUT: "DEADLINE_EXCEEDED",
    HTTPStatus.METHOD_NOT_ALLOWED: "UNIMPLEMENTED",
    HTTPStatus.NOT_IMPLEMENTED: "UNIMPLEMENTED",
    HTTPStatus.TOO_MANY_REQUESTS: "RESOURCE_EXHAUSTED",
    HTTPStatus.BAD_GATEWAY: "UNAVAILABLE",
    HTTPStatus.SERVICE_UNAVAILABLE: "UNAVAILABLE",
    HTTPStatus.GATEWAY_TIMEOUT: "DEADLINE_EXCEEDED",
}


def _status(error: BaseException) -> str:
    """Name of the gRPC status of an error, or of the one that its HTTP status means."""
    match error:
        case grpc.Call():
            return error.code().name
        case ResourceExhaustedResponse():
            return "RESOURCE_EXHAUSTED"
        case ResponseHandlingException():
            return "DEADLINE_EXCEEDED" if "timed out" in str(error) else "UNAVAILABLE"
        case UnexpectedResponse(status_code=code):
            return _HTTP.get(code, "UNKNOWN")
    return "UNKNOWN"


def _detail(error: BaseException) -> str:
    match error:
        case grpc.Call():
            text = error.details() or ""
        case UnexpectedResponse():
            text = error.content.decode(errors="replace") or error.reason_phrase
        case _:
            text = str(error)
    return " ".join(text.split())[:300]


def _may_pass(error: BaseException) -> bool:
    return isinstance(error, _Errors) and _status(error) in {"UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED"}


def _pause(state: RetryCallState) -> float:
    """Seconds until the next try: as long as the server asks for, else longer each time."""
    asked = getattr(state.outcome.exception(), "retry_after_s", 0) if state.outcome else 0
    return max(asked, _BACK_OFF(state))


def _log_retry(state: RetryCallState) -> None:
    error = state.outcome.exception() if state.outcome else None
    log.warning("the server did not do it (%s): trying again", _detail(error) if error else "no answer")


def _explained(error: BaseException, settings: QdrantSettings) -> CuepointError:
    """One message for what a server answered, or did not."""
    server, detail = f"the Qdrant server at {settings.location}", _detail(error)
    if any(sign in detail.lower() for sign in ("no space left", "not enough space", "disk is full", "out of disk")):
        return EnvironmentFault(f"{server} has no room left on its disk ({detail}): make room and run again")
    ports = f"gRPC port {settings.grpc_port}" if settings.prefer_grpc else "HTTP"
    key = "refuses the API key in" if os.environ.get(settings.api_key_env) else "wants an API key: set"
    unauthenticated = f"{key} the environment variable {settings.api_key_env} ({detail})"
    messages = {
        "UNAVAILABLE": f"does not answer ({ports}: {detail}): start it, or correct qdrant.location, grpc_port or "
        "prefer_grpc; a later run goes on from here",
        "UNAUTHENTICATED": unauthenticated,
        "PERMISSION_DENIED": unauthenticated,
        "DEADLINE_EXCEEDED": f"took longer than qdrant.timeout = {settings.timeout:g} seconds ({detail}): raise it, or "
        "lower qdrant.batch_size",
        "RESOURCE_EXHAUSTED": f"refuses so many or so large requests ({detail}): lower qdrant.batch_size",
        "UNIMPLEMENTED": f"is of another version, it does not know this request ({detail})",
    }
    status = _status(error)
    if status in messages:
        return EnvironmentFault(f"{server} {messages[status]}")
    return DataError(f"{server} refuses the request: {detail}")
