"""Everything that knows how to talk to a backbone."""

from passion_plugin.backbone.masks import MaskCodec
from passion_plugin.backbone.spec import BackboneSpec

__all__ = ["BackboneSpec", "MaskCodec"]
