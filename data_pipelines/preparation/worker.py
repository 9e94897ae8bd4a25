"""A process of Beam's local runner. Beam's own reports on the life of such processes are for who works on Beam."""

import logging
import sys

if __name__ == "__main__":
    logging.disable(logging.WARNING)
    from apache_beam.runners.worker import sdk_worker_main

    sdk_worker_main.main(sys.argv)
