"""Qdrant's gRPC protocol in front of qdrant-client's local mode: what the server adapter sends really travels.

It stands in for the server that cannot be installed from a package registry. It checks the API key, keeps aliases and
answers searches, counts and facets; it builds no index, so of tuning requests it only remembers what was asked.
"""

from concurrent import futures

import grpc
from qdrant_client import QdrantClient
from qdrant_client import grpc as wire
from qdrant_client.conversions.conversion import GrpcToRest, RestToGrpc, grpc_to_payload

COMPLETED = wire.UpdateResult(operation_id=0, status=wire.UpdateStatus.Completed)


class Root(wire.QdrantServicer):
    def __init__(self, server):
        self.server = server

    def HealthCheck(self, request, context):
        return wire.HealthCheckReply(title="qdrant", version=self.server.version)


class Collections(wire.CollectionsServicer):
    def __init__(self, server):
        self.server, self.local = server, server.local

    def CollectionExists(self, request, context):
        exists = self.local.collection_exists(request.collection_name)
        return wire.CollectionExistsResponse(result=wire.CollectionExists(exists=exists))

    def Create(self, request, context):
        self.server.asked.append(request)
        self.local.create_collection(
            request.collection_name,
            vectors_config=GrpcToRest.convert_vectors_config(request.vectors_config),
            metadata=grpc_to_payload(request.metadata),
        )
        return wire.CollectionOperationResponse(result=True)

    def Update(self, request, context):
        self.server.asked.append(request)
        return wire.CollectionOperationResponse(result=True)

    def Get(self, request, context):
        info = self.local.get_collection(request.collection_name)
        return wire.GetCollectionInfoResponse(result=RestToGrpc.convert_collection_info(info))

    def List(self, request, context):
        names = [each.name for each in self.local.get_collections().collections]
        return wire.ListCollectionsResponse(collections=[wire.CollectionDescription(name=name) for name in names])

    def Delete(self, request, context):
        return wire.CollectionOperationResponse(result=self.local.delete_collection(request.collection_name))

    def ListAliases(self, request, context):
        aliases = self.local.get_aliases().aliases
        return wire.ListAliasesResponse(aliases=[RestToGrpc.convert_alias_description(alias) for alias in aliases])

    def UpdateAliases(self, request, context):
        self.server.asked.append(request)
        actions = [GrpcToRest.convert_alias_operations(action) for action in request.actions]
        return wire.CollectionOperationResponse(result=self.local.update_collection_aliases(actions))


class Points(wire.PointsServicer):
    def __init__(self, server):
        self.server, self.local = server, server.local

    def CreateFieldIndex(self, request, context):
        self.server.indexed.add(request.field_name)
        return wire.PointsOperationResponse(result=COMPLETED)

    def Upsert(self, request, context):
        assert request.wait, "an acknowledged point is not yet a stored one"
        points = [GrpcToRest.convert_point_struct(point) for point in request.points]
        self.local.upsert(request.collection_name, points)
        return wire.PointsOperationResponse(result=COMPLETED)

    def Delete(self, request, context):
        self.local.delete(request.collection_name, GrpcToRest.convert_points_selector(request.points))
        return wire.PointsOperationResponse(result=COMPLETED)

    def Count(self, request, context):
        count = self.local.count(request.collection_name, exact=request.exact).count
        return wire.CountResponse(result=wire.CountResult(count=count))

    def Facet(self, request, context):
        assert request.exact
        found = self.local.facet(request.collection_name, request.key, limit=request.limit).hits
        hits = [wire.FacetHit(value=wire.FacetValue(string_value=hit.value), count=hit.count) for hit in found]
        return wire.FacetResponse(hits=hits)

    def Get(self, request, context):
        ids = [GrpcToRest.convert_point_id(each) for each in request.ids]
        records = self.local.retrieve(request.collection_name, ids, with_payload=True, with_vectors=True)
        return wire.GetResponse(result=[RestToGrpc.convert_record(record) for record in records])

    def Query(self, request, context):
        found = self.local.query_points(
            request.collection_name,
            query=GrpcToRest.convert_query(request.query),
            query_filter=GrpcToRest.convert_filter(request.filter) if request.HasField("filter") else None,
            limit=request.limit,
            with_payload=True,
        )
        return wire.QueryResponse(result=[RestToGrpc.convert_scored_point(point) for point in found.points])


class Keyed(grpc.ServerInterceptor):
    """Refuses requests without the key, as a server with one does."""

    def __init__(self, server):
        self.server = server

    def intercept_service(self, continuation, details):
        given = dict(details.invocation_metadata).get("api-key")
        if self.server.api_key in {None, given}:
            return continuation(details)

        def refuse(request, context):
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "Must provide an API key or an Authorization bearer token")

        return grpc.unary_unary_rpc_method_handler(refuse)


class WireQdrant:
    """A running server: `port`; `asked` holds the requests that change collections, `indexed` the payload indexes."""

    def __init__(self, api_key=None, version="1.17.0"):
        self.api_key, self.version = api_key, version
        self.local = QdrantClient(":memory:")
        self.asked, self.indexed = [], set()
        self._server = grpc.server(futures.ThreadPoolExecutor(1), interceptors=[Keyed(self)])
        wire.add_QdrantServicer_to_server(Root(self), self._server)
        wire.add_CollectionsServicer_to_server(Collections(self), self._server)
        wire.add_PointsServicer_to_server(Points(self), self._server)
        self.port = self._server.add_insecure_port("127.0.0.1:0")
        self._server.start()

    def settings(self, **more):
        return {"location": "http://127.0.0.1:1", "grpc_port": self.port, "attempts": 1, "timeout": 30} | more

    def stop(self):
        self._server.stop(None).wait()
