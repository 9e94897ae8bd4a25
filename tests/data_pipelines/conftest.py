"""Buckets on emulators of object stores."""

from tests.emulators import gs_bucket, gs_server, s3_bucket, s3_server

__all__ = ["gs_bucket", "gs_server", "s3_bucket", "s3_server"]
