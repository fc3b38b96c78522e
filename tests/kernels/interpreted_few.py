"""Runs the few cases of prompts, of routing and of a layer's small kernels in one process: importing torch and Triton takes longer.

    TRITON_INTERPRET=1 python tests/kernels/interpreted_few.py

Prints three lines of JSON: what `interpreted_prefill.py`, `interpreted_route.py` and `interpreted_layer.py` print.
"""

import interpreted_layer
import interpreted_prefill
import interpreted_route

if __name__ == "__main__":
    interpreted_prefill.main()
    interpreted_route.main()
    interpreted_layer.main()
