"""Routers of mixture-of-experts models."""

from transformers import PreTrainedModel


def without_router_loss(model: PreTrainedModel) -> dict[str, bool]:
    """Keyword arguments of a forward that leave out the routers' loss, where the model's config asks for it.

    The model computes that loss from a mask of (B, L) for all tokens that it forwards. A mask of another shape, as of
    rows without padding or of a cache, ends in an error.
    """
    config = model.config.get_text_config()
    return {"output_router_logits": False} if getattr(config, "output_router_logits", False) else {}
