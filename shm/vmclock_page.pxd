from libc.stdint cimport int16_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t

cdef extern from "vmclock_page.h" nogil:
    # Wider than C's long long: only for C arithmetic, never for Cython's own conversion to a Python int.
    ctypedef long long int128 "__int128"

    struct vmclock_page:
        uint32_t magic
        uint32_t size
        uint16_t version
        uint8_t counter_id
        uint8_t time_type
        uint32_t seq_count
        uint64_t disruption_marker
        uint64_t flags
        uint8_t clock_status
        uint8_t leap_second_smearing_hint
        int16_t tai_offset_sec
        uint8_t leap_indicator
        uint8_t counter_period_shift
        uint64_t counter_value
        uint64_t counter_period_frac_sec
        uint64_t counter_period_esterror_rate_frac_sec
        uint64_t counter_period_maxerror_rate_frac_sec
        uint64_t time_sec
        uint64_t time_frac_sec
        uint64_t time_esterror_nanosec
        uint64_t time_maxerror_nanosec
        uint64_t vm_generation_counter

    struct vmclock_source:
        const vmclock_page *map
        int fd

    const int64_t VMCLOCK_STALL_NS

    int64_t vmclock_monotonic_ns()
    int vmclock_sequence(const vmclock_source *source, uint32_t *sequence)
    bint vmclock_unchanged(const vmclock_source *source, uint32_t sequence)
    int vmclock_copy(const vmclock_source *source, vmclock_page *into)
    void vmclock_begin_update(vmclock_page *page)
    void vmclock_end_update(vmclock_page *page)
    void vmclock_publish(vmclock_page *page, const vmclock_page *next)
    int128 vmclock_time_ns(const vmclock_page *page, uint64_t counter)
    int128 vmclock_error_ns(const vmclock_page *page, uint64_t counter, uint64_t error_ns, uint64_t rate)
    double vmclock_period_ns(const vmclock_page *page)
