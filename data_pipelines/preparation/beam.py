"""The used part of Apache Beam, imported without its warnings about missing optional clients."""

import logging

logging.disable(logging.WARNING)
try:
    from apache_beam import Create, DoFn, ParDo, Pipeline, Reshuffle
    from apache_beam.options.pipeline_options import PipelineOptions
    from apache_beam.runners.portability.fn_api_runner.fn_runner import FnApiRunner
    from apache_beam.runners.runner import PipelineRunner, create_runner
    from apache_beam.transforms.environments import SubprocessSDKEnvironment
finally:
    logging.disable(logging.NOTSET)

logging.getLogger("apache_beam").setLevel(logging.CRITICAL)  # errors are raised as exceptions

__all__ = [
    "Create",
    "DoFn",
    "FnApiRunner",
    "ParDo",
    "Pipeline",
    "PipelineOptions",
    "PipelineRunner",
    "Reshuffle",
    "SubprocessSDKEnvironment",
    "create_runner",
]
