from libc.stdint cimport uint64_t

cdef extern from "counter.h" nogil:
    const int COUNTER_ID
    void counter_barrier()
    uint64_t counter_edge()
    uint64_t counter_read()
