"""What a config.json says about a mixture of experts."""

import dataclasses
import math

from opt_deus_jax.errors import UserError
from opt_deus_jax.models.families import Family, Fields
from opt_deus_jax.models.rope import is_number

_NUMBER = ("num_experts", "num_local_experts")
_PUBLISHED_NUMBER = 128


@dataclasses.dataclass(frozen=True)
class ExpertConfig:
    """A mixture of experts: MLPs of one shape, of which a router chooses some for each token.

    Attributes:
        number: How many a layer has.
        per_token: How many of them each token is sent to.
        width: Neurons of each.
        is_normalized: Whether the weights of the chosen ones are made to sum to 1.
        balance: What `balance_loss` weighs beside the cross-entropy in training; 0 for not at all.
    """

    number: int
    per_token: int
    width: int
    is_normalized: bool
    balance: float


def read_experts(fields: Fields, family: Family, where: str) -> ExpertConfig | None:
    """Reads the fields about experts.

    Args:
        fields: Those of config.json, and the defaults of those it has not.
        family: The architecture.
        where: What error messages call the config.

    Returns:
        None for an architecture without experts.

    Raises:
        UserError: A field is of the wrong type or out of range, or contradicts another.
    """
    if family.experts is None:
        return None
    given = [fields[key] for key in _NUMBER if fields.get(key) is not None]
    if given and given[0] != given[-1]:
        raise UserError(
            f"{where}: fields num_experts={fields['num_experts']!r} and num_local_experts="
            f"{fields['num_local_experts']!r} contradict each other; remove one"
        )
    number = given[0] if given else _PUBLISHED_NUMBER
    counts = {
        "num_local_experts": number,
        "num_experts_per_tok": fields["num_experts_per_tok"],
        family.experts.width_field: fields[family.experts.width_field],
    }
    for key, value in counts.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{where}: field {key}={value!r} must be a positive integer")
    if fields["num_experts_per_tok"] > number:
        raise UserError(
            f"{where}: field num_experts_per_tok={fields['num_experts_per_tok']} exceeds the "
            f"{number} experts of num_local_experts"
        )
    balance = fields["router_aux_loss_coef"]
    if not (is_number(balance) and math.isfinite(balance) and balance >= 0):
        raise UserError(f"{where}: field router_aux_loss_coef={balance!r} must be 0 or more")
    for key in ("output_router_logits", "norm_topk_prob"):
        if not isinstance(fields.get(key, True), bool):
            raise UserError(f"{where}: field {key}={fields[key]!r} must be true or false")
    return ExpertConfig(
        number,
        fields["num_experts_per_tok"],
        fields[family.experts.width_field],
        # Where an architecture has no such field, it always does.
        fields.get("norm_topk_prob", True),
        # transformers adds the loss where it gives the router's logits.
        float(balance) if fields["output_router_logits"] else 0.0,
    )
