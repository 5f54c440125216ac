/* The layouts as this compiler sees them: a line "structure field offset size" for each field. */
#include <stdio.h>
#include <sys/time.h>
#include <time.h>

#include "ntp_segment.h"
#include "vmclock_page.h"

/* chrony's SOCK datagram, with the types of this C library. */
struct sock_sample {
	struct timeval tv;
	double offset;
	int pulse;
	int leap;
	int padding;
	int magic;
};

/* NTP's shared memory, with the types that ntpd and chrony declare it with. */
struct shm_time {
	int mode;
	int count;
	time_t clock_sec;
	int clock_usec;
	time_t receive_sec;
	int receive_usec;
	int leap;
	int precision;
	int nsamples;
	int valid;
	unsigned clock_nsec;
	unsigned receive_nsec;
	int dummy[8];
};

#define SHOW(structure, field) \
	printf("%s %s %zu %zu\n", #structure, #field, offsetof(struct structure, field), sizeof(((struct structure *)0)->field))
#define WHOLE(structure) printf("%s whole 0 %zu\n", #structure, sizeof(struct structure))

#define SEGMENT(structure) \
	WHOLE(structure); \
	SHOW(structure, mode); \
	SHOW(structure, count); \
	SHOW(structure, clock_sec); \
	SHOW(structure, clock_usec); \
	SHOW(structure, receive_sec); \
	SHOW(structure, receive_usec); \
	SHOW(structure, leap); \
	SHOW(structure, precision); \
	SHOW(structure, nsamples); \
	SHOW(structure, valid); \
	SHOW(structure, clock_nsec); \
	SHOW(structure, receive_nsec); \
	SHOW(structure, dummy)

int main(void)
{
	WHOLE(vmclock_page);
	SHOW(vmclock_page, magic);
	SHOW(vmclock_page, size);
	SHOW(vmclock_page, version);
	SHOW(vmclock_page, counter_id);
	SHOW(vmclock_page, time_type);
	SHOW(vmclock_page, seq_count);
	SHOW(vmclock_page, disruption_marker);
	SHOW(vmclock_page, flags);
	SHOW(vmclock_page, pad);
	SHOW(vmclock_page, clock_status);
	SHOW(vmclock_page, leap_second_smearing_hint);
	SHOW(vmclock_page, tai_offset_sec);
	SHOW(vmclock_page, leap_indicator);
	SHOW(vmclock_page, counter_period_shift);
	SHOW(vmclock_page, counter_value);
	SHOW(vmclock_page, counter_period_frac_sec);
	SHOW(vmclock_page, counter_period_esterror_rate_frac_sec);
	SHOW(vmclock_page, counter_period_maxerror_rate_frac_sec);
	SHOW(vmclock_page, time_sec);
	SHOW(vmclock_page, time_frac_sec);
	SHOW(vmclock_page, time_esterror_nanosec);
	SHOW(vmclock_page, time_maxerror_nanosec);
	SHOW(vmclock_page, vm_generation_counter);

	SEGMENT(ntp_segment);
	SEGMENT(shm_time);

	WHOLE(sock_sample);
	SHOW(sock_sample, tv);
	SHOW(sock_sample, offset);
	SHOW(sock_sample, pulse);
	SHOW(sock_sample, leap);
	SHOW(sock_sample, padding);
	SHOW(sock_sample, magic);
	return 0;
}
