"""Whatever arrives as an order, the answer is one the document knows, and never a 5xx."""

from __future__ import annotations

import json

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpud.api.schemas import OrderBody, parse_order
from gpud.errors import Code, GpudError
from tests.unit.client import Client
from tests.unit.service import Service

fuzz = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)
field_names = st.sampled_from([*OrderBody.model_fields, "later"])
good = {"instance_id": "fuzz", "gpu_type": "h100_sxm", "gpu_count": 1, "tier": "spot"}
bodies = (
    st.binary(max_size=300)
    | json_values.map(json.dumps).map(str.encode)
    | st.dictionaries(field_names, json_values).map(lambda body: json.dumps(good | body).encode())
)


@fuzz
@given(body=bodies)
async def test_any_body_gets_a_final_answer(client: Client, service: Service, body: bytes) -> None:
    answer = await client.post(body)
    assert answer.status in {201, 400, 409, 422}
    assert len(service.store.live) <= 2


@given(body=bodies)
def test_any_body_is_an_order_or_a_refusal(body: bytes) -> None:
    try:
        order, unknown_fields = parse_order(body)
    except GpudError as error:
        refusal = error.code
    else:
        given_fields = json.loads(body)
        assert order.instance_id == given_fields["instance_id"]
        assert unknown_fields == len(given_fields.keys() - OrderBody.model_fields)
        return
    assert refusal in {Code.INVALID_JSON, Code.INVALID_REQUEST, Code.NOT_OFFERED}


@fuzz
@given(path=st.text(st.characters(min_codepoint=33, max_codepoint=126, exclude_characters="?#")))
async def test_any_path_gets_a_final_answer(client: Client, path: str) -> None:
    answer = await client.get(f"/v1/instances/{path}")
    assert answer.status in {400, 404, 405}
