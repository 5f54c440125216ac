from libc.stdint cimport int32_t, int64_t, uint32_t

cdef extern from "ntp_segment.h" nogil:
    const int NTP_SEGMENT_KEY
    const int NTP_SEGMENT_NOT_IN_SYNC

    struct ntp_segment:
        int32_t mode
        int32_t count
        int64_t clock_sec
        int32_t clock_usec
        int64_t receive_sec
        int32_t receive_usec
        int32_t leap
        int32_t precision
        int32_t nsamples
        int32_t valid
        uint32_t clock_nsec
        uint32_t receive_nsec

    void ntp_segment_put(ntp_segment *segment, const ntp_segment *state)
