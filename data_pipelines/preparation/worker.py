"""A process of Beam's local runner, without Beam's log messages about its life cycle."""

import logging
import sys

if __name__ == "__main__":
    logging.disable(logging.WARNING)
    from apache_beam.runners.worker import sdk_worker_main

    sdk_worker_main.main(sys.argv)
