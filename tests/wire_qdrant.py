"""Qdrant's gRPC and REST in front of qdrant-client's local mode: what the server adapter sends really travels.

It stands in for the server that cannot be installed from a package registry. It checks the API key, keeps aliases,
answers searches, counts and facets, and refuses what a collection in strict mode refuses; it builds no index, so of
tuning requests it only remembers what was asked. It can be told to stop answering after a number of changes.
"""

import re
import threading
from concurrent import futures
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import grpc
from pydantic import TypeAdapter
from qdrant_client import QdrantClient, models
from qdrant_client import grpc as wire
from qdrant_client.conversions.conversion import GrpcToRest, RestToGrpc, grpc_to_payload

NO_KEY = "Must provide an API key or an Authorization bearer token"


class Refused(Exception):
    """An answer that is none: its gRPC status and its HTTP status."""

    def __init__(self, code, http, detail, retry_after=None):
        super().__init__(detail)
        self.code, self.http, self.detail, self.retry_after = code, http, detail, retry_after


@dataclass
class Qdrant:
    """What both protocols give access to."""

    api_key: str | None = None
    version: str = "1.17.0"
    strict: models.StrictModeConfigOutput | None = None
    changes: list[tuple[str, Any]] = field(default_factory=list)  # what was asked to change, in order
    stops_after: int | None = None  # changes, then nothing is answered any more
    refusals: list[Refused] = field(default_factory=list)  # for the next requests
    states: list[dict[str, Any]] = field(
        default_factory=list
    )  # of a collection, one after the other once it is to be indexed

    def __post_init__(self):
        self.local = QdrantClient(":memory:")
        self.lock = threading.Lock()
        self.silence = threading.Event()  # once it is over, requests are answered
        self.silence.set()

    def check(self, key):
        self.silence.wait()
        if self.refusals:
            raise self.refusals.pop()
        if self.api_key not in {None, key}:
            raise Refused(grpc.StatusCode.UNAUTHENTICATED, 401, NO_KEY)
        if self.stops_after is not None and self.stops_after <= 0:
            raise Refused(grpc.StatusCode.UNAVAILABLE, 503, "this server has stopped")

    def change(self, name, request, apply):
        self.changes.append((name, request))
        if self.stops_after is not None:
            self.stops_after -= 1
        return apply()

    def allow(self, asked, limit, what):
        if self.strict and limit is not None and asked > limit:
            raise Refused(grpc.StatusCode.INVALID_ARGUMENT, 400, f'Limit exceeded {asked} > {limit} for "{what}"')

    def allow_exact(self, exact):
        self.allow(bool(exact), None if not self.strict else self.strict.search_allow_exact, "exact")

    def limit(self, name):
        return getattr(self.strict, name, None)

    def create(self, name, request):
        return self.change(
            "create",
            request,
            lambda: self.local.create_collection(name, vectors_config=request.vectors, metadata=request.metadata),
        )

    def update(self, name, request):
        return self.change("update", request, lambda: True)

    def get(self, name):
        info = self.local.get_collection(name)
        state = self.states.pop(0) if self.states and self.changes[-1][0] == "update" else {}
        config = info.config.model_copy(update={"strict_mode_config": self.strict})
        return info.model_copy(update={"config": config, **state})

    def drop(self, name):
        return self.change("drop", name, lambda: self.local.delete_collection(name))

    def move(self, actions):
        return self.change("move", actions, lambda: self.local.update_collection_aliases(actions))

    def index(self, name, key, kind, wait):
        assert wait, "an index that is being built is not yet one"
        return self.change("index", (key, kind), lambda: None)

    def upsert(self, name, points, wait):
        assert wait, "an acknowledged point is not yet a stored one"
        self.allow(len(points), self.limit("upsert_max_batchsize"), "upsert limit")
        return self.change("upsert", points, lambda: self.local.upsert(name, points))

    def delete(self, name, selector, wait):
        assert wait, "an acknowledged deletion is not yet one"
        for condition in [*selector.filter.must, *(selector.filter.must_not or [])]:
            self.allow(len(condition.match.any), self.limit("condition_max_size"), "condition")
        return self.change("delete", selector, lambda: self.local.delete(name, selector))

    def count(self, name, exact):
        self.allow_exact(exact)
        return self.local.count(name, exact=exact)

    def facet(self, name, key, limit, exact):
        assert exact
        self.allow_exact(exact)
        self.allow(limit, self.limit("max_query_limit"), "limit")
        return self.local.facet(name, key, limit=limit)

    def scroll(self, name, limit, offset, with_payload):
        self.allow(limit, self.limit("max_query_limit"), "limit")
        return self.local.scroll(name, limit=limit, offset=offset, with_payload=with_payload)

    def retrieve(self, name, ids):
        return self.local.retrieve(name, ids, with_payload=True, with_vectors=True)

    def query(self, name, query, query_filter, limit, exact):
        self.allow_exact(exact)
        self.allow(limit, self.limit("max_query_limit"), "limit")
        return self.local.query_points(name, query=query, query_filter=query_filter, limit=limit, with_payload=True)


def given(message, name, convert):
    """A part of a gRPC message as REST's model, None if it was not sent."""
    return convert(getattr(message, name)) if message.HasField(name) else None


class Root(wire.QdrantServicer):
    def __init__(self, qdrant):
        self.qdrant = qdrant

    def HealthCheck(self, request, context):
        return wire.HealthCheckReply(title="qdrant", version=self.qdrant.version)


class Collections(wire.CollectionsServicer):
    def __init__(self, qdrant):
        self.qdrant = qdrant

    def CollectionExists(self, request, context):
        exists = self.qdrant.local.collection_exists(request.collection_name)
        return wire.CollectionExistsResponse(result=wire.CollectionExists(exists=exists))

    def Create(self, request, context):
        asked = models.CreateCollection(
            vectors=GrpcToRest.convert_vectors_config(request.vectors_config),
            hnsw_config=given(request, "hnsw_config", GrpcToRest.convert_hnsw_config_diff),
            optimizers_config=given(request, "optimizers_config", GrpcToRest.convert_optimizers_config_diff),
            quantization_config=given(request, "quantization_config", GrpcToRest.convert_quantization_config),
            on_disk_payload=given(request, "on_disk_payload", bool),
            shard_number=given(request, "shard_number", int),
            replication_factor=given(request, "replication_factor", int),
            metadata=grpc_to_payload(request.metadata),
        )
        return wire.CollectionOperationResponse(result=self.qdrant.create(request.collection_name, asked))

    def Update(self, request, context):
        asked = models.UpdateCollection(
            vectors=given(request, "vectors_config", GrpcToRest.convert_vectors_config_diff),
            hnsw_config=given(request, "hnsw_config", GrpcToRest.convert_hnsw_config_diff),
            optimizers_config=given(request, "optimizers_config", GrpcToRest.convert_optimizers_config_diff),
            quantization_config=given(request, "quantization_config", GrpcToRest.convert_quantization_config_diff),
            params=given(request, "params", GrpcToRest.convert_collection_params_diff),
        )
        return wire.CollectionOperationResponse(result=self.qdrant.update(request.collection_name, asked))

    def Get(self, request, context):
        info = self.qdrant.get(request.collection_name)
        return wire.GetCollectionInfoResponse(result=RestToGrpc.convert_collection_info(info))

    def List(self, request, context):
        names = [each.name for each in self.qdrant.local.get_collections().collections]
        return wire.ListCollectionsResponse(collections=[wire.CollectionDescription(name=name) for name in names])

    def Delete(self, request, context):
        return wire.CollectionOperationResponse(result=self.qdrant.drop(request.collection_name))

    def ListAliases(self, request, context):
        aliases = self.qdrant.local.get_aliases().aliases
        return wire.ListAliasesResponse(aliases=[RestToGrpc.convert_alias_description(alias) for alias in aliases])

    def UpdateAliases(self, request, context):
        actions = [GrpcToRest.convert_alias_operations(action) for action in request.actions]
        return wire.CollectionOperationResponse(result=self.qdrant.move(actions))


class Points(wire.PointsServicer):
    def __init__(self, qdrant):
        self.qdrant = qdrant

    def CreateFieldIndex(self, request, context):
        kind = wire.FieldType.Name(request.field_type).removeprefix("FieldType").lower()
        self.qdrant.index(request.collection_name, request.field_name, kind, request.wait)
        return done()

    def Upsert(self, request, context):
        points = [GrpcToRest.convert_point_struct(point) for point in request.points]
        self.qdrant.upsert(request.collection_name, points, request.wait)
        return done()

    def Delete(self, request, context):
        self.qdrant.delete(request.collection_name, GrpcToRest.convert_points_selector(request.points), request.wait)
        return done()

    def Count(self, request, context):
        count = self.qdrant.count(request.collection_name, request.exact).count
        return wire.CountResponse(result=wire.CountResult(count=count))

    def Facet(self, request, context):
        found = self.qdrant.facet(request.collection_name, request.key, request.limit, request.exact).hits
        hits = [wire.FacetHit(value=wire.FacetValue(string_value=hit.value), count=hit.count) for hit in found]
        return wire.FacetResponse(hits=hits)

    def Scroll(self, request, context):
        offset = given(request, "offset", GrpcToRest.convert_point_id)
        payload = GrpcToRest.convert_with_payload_selector(request.with_payload)
        found, after = self.qdrant.scroll(request.collection_name, request.limit, offset, payload)
        records = [record.model_copy(update={"payload": record.payload or {}}) for record in found]
        response = wire.ScrollResponse(result=[RestToGrpc.convert_record(record) for record in records])
        if after is not None:
            response.next_page_offset.CopyFrom(RestToGrpc.convert_extended_point_id(after))
        return response

    def Get(self, request, context):
        ids = [GrpcToRest.convert_point_id(each) for each in request.ids]
        records = self.qdrant.retrieve(request.collection_name, ids)
        return wire.GetResponse(result=[RestToGrpc.convert_record(record) for record in records])

    def Query(self, request, context):
        found = self.qdrant.query(
            request.collection_name,
            GrpcToRest.convert_query(request.query),
            given(request, "filter", GrpcToRest.convert_filter),
            request.limit,
            request.params.exact,
        )
        return wire.QueryResponse(result=[RestToGrpc.convert_scored_point(point) for point in found.points])


def done():
    completed = wire.UpdateResult(operation_id=0, status=wire.UpdateStatus.Completed)
    return wire.PointsOperationResponse(result=completed)


class Gate(grpc.ServerInterceptor):
    """Lets a request through to the servicers, or gives the refusal as gRPC's status."""

    def __init__(self, qdrant):
        self.qdrant = qdrant

    def intercept_service(self, continuation, details):
        handler = continuation(details)
        key = dict(details.invocation_metadata).get("api-key")

        def answer(request, context):
            try:
                self.qdrant.check(key)
                return handler.unary_unary(request, context)
            except Refused as refused:
                if refused.retry_after:
                    context.set_trailing_metadata([("retry-after", str(refused.retry_after))])
                context.abort(refused.code, refused.detail)

        return grpc.unary_unary_rpc_method_handler(
            answer, request_deserializer=handler.request_deserializer, response_serializer=handler.response_serializer
        )


class Rest(BaseHTTPRequestHandler):
    """The same requests as JSON over HTTP."""

    protocol_version = "HTTP/1.1"
    qdrant: Qdrant

    def answer(self):
        sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path, _, query = self.path.partition("?")
        try:
            self.qdrant.check(self.headers.get("api-key"))
            with self.qdrant.lock:
                result = self.route(f"{self.command} {path}", sent, "wait=true" in query)
            self.give(200, {"result": result, "status": "ok", "time": 0.0} if path != "/" else result)
        except Refused as refused:
            self.give(refused.http, {"status": {"error": refused.detail}, "time": 0.0}, refused.retry_after)

    do_GET = do_PUT = do_POST = do_PATCH = do_DELETE = answer

    def route(self, what, sent, wait):
        qdrant = self.qdrant
        name = match[1] if (match := re.search(r"/collections/([^/]+)", what)) else ""

        def read(model):
            return TypeAdapter(model).validate_json(sent)

        match what.replace(f"/collections/{name}", "/collections/NAME") if name else what:
            case "GET /":
                return {"title": "qdrant", "version": qdrant.version}
            case "GET /collections":
                return qdrant.local.get_collections()
            case "GET /aliases":
                return qdrant.local.get_aliases()
            case "POST /collections/NAME" if name == "aliases":
                return qdrant.move(read(models.ChangeAliasesOperation).actions)
            case "GET /collections/NAME/exists":
                return {"exists": qdrant.local.collection_exists(name)}
            case "PUT /collections/NAME":
                return qdrant.create(name, read(models.CreateCollection))
            case "PATCH /collections/NAME":
                return qdrant.update(name, read(models.UpdateCollection))
            case "GET /collections/NAME":
                return qdrant.get(name)
            case "DELETE /collections/NAME":
                return qdrant.drop(name)
            case "PUT /collections/NAME/index":
                asked = read(models.CreateFieldIndex)
                qdrant.index(name, asked.field_name, asked.field_schema.value, wait)
            case "PUT /collections/NAME/points":
                qdrant.upsert(name, read(models.PointsList).points, wait)
            case "POST /collections/NAME/points/delete":
                qdrant.delete(name, read(models.FilterSelector), wait)
            case "POST /collections/NAME/points/count":
                return qdrant.count(name, read(models.CountRequest).exact)
            case "POST /collections/NAME/facet":
                asked = read(models.FacetRequest)
                return qdrant.facet(name, asked.key, asked.limit, asked.exact)
            case "POST /collections/NAME/points/scroll":
                asked = read(models.ScrollRequest)
                records, after = qdrant.scroll(name, asked.limit, asked.offset, asked.with_payload)
                return models.ScrollResult(points=records, next_page_offset=after)
            case "POST /collections/NAME/points":
                return qdrant.retrieve(name, read(models.PointRequest).ids)
            case "POST /collections/NAME/points/query":
                asked = read(models.QueryRequest)
                return qdrant.query(name, asked.query, asked.filter, asked.limit, asked.params.exact)
            case _:
                raise Refused(grpc.StatusCode.UNIMPLEMENTED, 404, f"no such request: {what}")
        return {"operation_id": 0, "status": "completed"}

    def give(self, status, content, retry_after=None):
        body = TypeAdapter(Any).dump_json(content)
        self.send_response(status)
        if retry_after:
            self.send_header("Retry-After", str(retry_after))
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


class WireQdrant:
    """A running server, by gRPC or by REST: `qdrant` is what it holds, `settings` name it."""

    def __init__(self, protocol="grpc", **options):
        self.qdrant = Qdrant(**options)
        self.protocol = protocol
        if protocol == "grpc":
            self.port = 0
            self.listen()
        else:
            handler = type("Handler", (Rest,), {"qdrant": self.qdrant})
            self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
            self._server.daemon_threads = True
            self.port = self._server.server_port
            threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def listen(self):
        """Answer gRPC, on the same port as before if there was one, with all that is stored."""
        self._server = grpc.server(futures.ThreadPoolExecutor(1), interceptors=[Gate(self.qdrant)])
        wire.add_QdrantServicer_to_server(Root(self.qdrant), self._server)
        wire.add_CollectionsServicer_to_server(Collections(self.qdrant), self._server)
        wire.add_PointsServicer_to_server(Points(self.qdrant), self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        self._server.start()

    def settings(self, **more):
        named = {"location": "http://127.0.0.1:1", "grpc_port": self.port}
        if self.protocol == "rest":
            named = {"location": f"http://127.0.0.1:{self.port}", "prefer_grpc": False}
        return named | {"attempts": 1, "timeout": 30} | more

    def stop(self):
        self.qdrant.silence.set()
        if self.protocol == "grpc":
            self._server.stop(None).wait()
        else:
            self._server.shutdown()
            self._server.server_close()


class VanishingQdrant(WireQdrant):
    """A server that is gone, port and all, after a number of batches; `gone` tells, `come_back` brings it back."""

    def __init__(self, upserts):
        super().__init__()
        self.gone = threading.Event()
        self._left, self._upsert = upserts, self.qdrant.upsert
        self.qdrant.upsert = self._counted

    def come_back(self):
        self.qdrant.upsert = self._upsert
        self.gone.clear()
        self.listen()

    def points(self):
        """How many are stored, over all collections."""
        local = self.qdrant.local
        return sum(local.count(each.name).count for each in local.get_collections().collections)

    def _counted(self, *request):
        if self._left == 0:
            self.gone.set()
            self._server.stop(None)  # not waited for: this is one of its own threads
            raise Refused(grpc.StatusCode.UNAVAILABLE, 503, "gone")
        self._left -= 1
        return self._upsert(*request)
