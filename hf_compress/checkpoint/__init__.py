"""Writing checkpoints that are complete or absent, and proving that they load."""

from hf_compress.checkpoint.verify import VerificationResult, verify
from hf_compress.checkpoint.writer import ShardWriter, publish, staging

__all__ = ["ShardWriter", "VerificationResult", "publish", "staging", "verify"]
