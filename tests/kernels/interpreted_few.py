"""Runs the few cases of prompts and of routing in one process, since importing torch and Triton takes longer than they do.

    TRITON_INTERPRET=1 python tests/kernels/interpreted_few.py

Prints two lines of JSON: what `interpreted_prefill.py` prints, and what `interpreted_route.py` prints.
"""

import interpreted_prefill
import interpreted_route

if __name__ == "__main__":
    interpreted_prefill.main()
    interpreted_route.main()
