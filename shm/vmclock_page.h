/*
 * The vmclock page: its layout, a bounded consistent copy, and the conversion from counter to time.
 *
 * Layout and meaning: include/uapi/linux/vmclock-abi.h, version 1.  All fields are little-endian.  A field
 * is there only if `size` covers it and, where it has a flag, the flag is set; nothing here judges that.
 */
#ifndef REFCLOCK_VMCLOCK_PAGE_H
#define REFCLOCK_VMCLOCK_PAGE_H

#include <errno.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the vmclock page is little-endian and read in place"
#endif

#define VMCLOCK_MAGIC 0x4b4c4356 /* "VCLK" */

struct vmclock_page {
	uint32_t magic;
	uint32_t size;
	uint16_t version;
	uint8_t counter_id;
	uint8_t time_type;
	uint32_t seq_count;
	uint64_t disruption_marker;
	uint64_t flags;
	uint8_t pad[2];
	uint8_t clock_status;
	uint8_t leap_second_smearing_hint;
	int16_t tai_offset_sec;
	uint8_t leap_indicator;
	uint8_t counter_period_shift;
	uint64_t counter_value;
	uint64_t counter_period_frac_sec;
	uint64_t counter_period_esterror_rate_frac_sec;
	uint64_t counter_period_maxerror_rate_frac_sec;
	uint64_t time_sec;
	uint64_t time_frac_sec;
	uint64_t time_esterror_nanosec;
	uint64_t time_maxerror_nanosec;
	uint64_t vm_generation_counter;
};

#define VMCLOCK_AT(field, offset) \
	_Static_assert(offsetof(struct vmclock_page, field) == (offset), "vmclock page: " #field)

VMCLOCK_AT(magic, 0x00);
VMCLOCK_AT(size, 0x04);
VMCLOCK_AT(version, 0x08);
VMCLOCK_AT(counter_id, 0x0a);
VMCLOCK_AT(time_type, 0x0b);
VMCLOCK_AT(seq_count, 0x0c);
VMCLOCK_AT(disruption_marker, 0x10);
VMCLOCK_AT(flags, 0x18);
VMCLOCK_AT(pad, 0x20);
VMCLOCK_AT(clock_status, 0x22);
VMCLOCK_AT(leap_second_smearing_hint, 0x23);
VMCLOCK_AT(tai_offset_sec, 0x24);
VMCLOCK_AT(leap_indicator, 0x26);
VMCLOCK_AT(counter_period_shift, 0x27);
VMCLOCK_AT(counter_value, 0x28);
VMCLOCK_AT(counter_period_frac_sec, 0x30);
VMCLOCK_AT(counter_period_esterror_rate_frac_sec, 0x38);
VMCLOCK_AT(counter_period_maxerror_rate_frac_sec, 0x40);
VMCLOCK_AT(time_sec, 0x48);
VMCLOCK_AT(time_frac_sec, 0x50);
VMCLOCK_AT(time_esterror_nanosec, 0x58);
VMCLOCK_AT(time_maxerror_nanosec, 0x60);
VMCLOCK_AT(vm_generation_counter, 0x68);
_Static_assert(sizeof(struct vmclock_page) == 112, "vmclock page: size");

#undef VMCLOCK_AT

#define NSEC_PER_SEC 1000000000

/* ---- The bounded sequence read -------------------------------------------------------------------- */

/*
 * How long a reader puts up with an odd or ever-changing sequence: as long as the Linux driver does
 * (ptp_vmclock gives up after 100 ms).
 */
#define VMCLOCK_STALL_NS (100 * (int64_t)1000000)

/*
 * Where the page is read: mapped, or through a file descriptor where mapping is refused.
 */
struct vmclock_source {
	const struct vmclock_page *map; /* NULL: read with pread */
	int fd;
};

static inline int64_t vmclock_monotonic_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (int64_t)now.tv_sec * NSEC_PER_SEC + now.tv_nsec;
}

static inline int vmclock_pread(int fd, void *into, size_t length, size_t offset)
{
	ssize_t got = pread(fd, into, length, (off_t)offset);

	if (got < 0)
		return errno;
	return (size_t)got == length ? 0 : ENODATA;
}

/*
 * The sequence counter as it stands, 0 or an errno.  The acquire pairs with the writer's release of the
 * even count after its last field: whoever sees that count sees those fields.
 */
static inline int vmclock_sequence(const struct vmclock_source *source, uint32_t *sequence)
{
	if (source->map) {
		*sequence = __atomic_load_n(&source->map->seq_count, __ATOMIC_ACQUIRE);
		return 0;
	}
	int error = vmclock_pread(source->fd, sequence, sizeof(*sequence), offsetof(struct vmclock_page, seq_count));
	atomic_thread_fence(memory_order_acquire);
	return error;
}

/*
 * Whether the page still stands at `sequence`.  The fence pairs with the writer's release fence between
 * making the count odd and its first field: if any load before this line saw a new field, the load below
 * sees at least the odd count.
 */
static inline int vmclock_unchanged(const struct vmclock_source *source, uint32_t sequence)
{
	uint32_t now;

	atomic_thread_fence(memory_order_acquire);
	return vmclock_sequence(source, &now) == 0 && now == sequence;
}

static inline int vmclock_load(const struct vmclock_source *source, struct vmclock_page *into)
{
	if (!source->map) {
		/* A page may be shorter than the structure: `size` says which fields it has. */
		memset(into, 0, sizeof(*into));
		return pread(source->fd, into, sizeof(*into), 0) < 0 ? errno : 0;
	}

	/* Word by word: these loads race with the writer on purpose, which only atomic ones may do. */
	const uint64_t *from = (const uint64_t *)source->map;
	uint64_t words[sizeof(*into) / 8];
	for (size_t i = 0; i < sizeof(*into) / 8; i++)
		words[i] = __atomic_load_n(&from[i], __ATOMIC_RELAXED);
	memcpy(into, words, sizeof(*into));
	return 0;
}

/*
 * One consistent copy of the page, its seq_count even.  Returns 0; ETIMEDOUT when no quiet moment came
 * within VMCLOCK_STALL_NS; another errno from a read that failed.  Sleeps between late tries, longer and
 * longer, so that a writer on the same CPU can finish and one that died costs little.
 */
static inline int vmclock_copy(const struct vmclock_source *source, struct vmclock_page *into)
{
	int64_t give_up_ns = 0;
	long pause_ns = 10000;

	for (unsigned int try = 0;; try++) {
		uint32_t sequence;
		int error = vmclock_sequence(source, &sequence);

		if (error)
			return error;
		if (!(sequence & 1)) {
			error = vmclock_load(source, into);
			if (error)
				return error;
			if (into->seq_count == sequence && vmclock_unchanged(source, sequence))
				return 0;
		}
		if (try < 64)
			continue;
		if (!give_up_ns)
			give_up_ns = vmclock_monotonic_ns() + VMCLOCK_STALL_NS;
		else if (vmclock_monotonic_ns() > give_up_ns)
			return ETIMEDOUT;
		if (sequence & 1) {
			struct timespec pause = { .tv_nsec = pause_ns };
			nanosleep(&pause, NULL);
			if (pause_ns < 1000000)
				pause_ns *= 2;
		}
	}
}

/*
 * The hypervisor's side (the simulator's, here): makes the page say `next`, but for seq_count, which it
 * counts itself.
 */
static inline void vmclock_begin_update(struct vmclock_page *page)
{
	__atomic_store_n(&page->seq_count, page->seq_count | 1, __ATOMIC_RELAXED);
	atomic_thread_fence(memory_order_release); /* pairs with the acquire fence of vmclock_unchanged() */
}

static inline void vmclock_end_update(struct vmclock_page *page)
{
	/* Pairs with the acquire load of vmclock_sequence(). */
	__atomic_store_n(&page->seq_count, page->seq_count + 1, __ATOMIC_RELEASE);
}

static inline void vmclock_publish(struct vmclock_page *page, const struct vmclock_page *next)
{
	uint64_t words[sizeof(*next) / 8];
	uint64_t *to = (uint64_t *)page;
	const size_t sequence_word = offsetof(struct vmclock_page, seq_count) / 8;

	memcpy(words, next, sizeof(*next));
	vmclock_begin_update(page);
	for (size_t i = 0; i < sizeof(*next) / 8; i++)
		if (i != sequence_word)
			__atomic_store_n(&to[i], words[i], __ATOMIC_RELAXED);
	__atomic_store_n((uint32_t *)&to[sequence_word], (uint32_t)words[sequence_word], __ATOMIC_RELAXED);
	vmclock_end_update(page);
}

/* ---- Counter to time ------------------------------------------------------------------------------ */

/*
 * Seconds as a fixed-point number: whole seconds, then five words of fraction, most significant first.
 * Five words hold every bit of ticks * period >> (64 + shift) for any shift that a byte can say, so that
 * nothing is rounded before the end.
 */
#define VMCLOCK_WORDS 5
struct vmclock_seconds {
	__int128 whole;
	uint64_t fraction[VMCLOCK_WORDS];
};

/* ticks * period * 2^-(64 + shift) seconds, exactly. */
static inline struct vmclock_seconds vmclock_span(uint64_t ticks, uint64_t period, uint8_t shift)
{
	unsigned __int128 product = (unsigned __int128)ticks * period;
	unsigned int word = shift / 64, bit = shift % 64;
	uint64_t limb[3] = {
		(uint64_t)(product >> 64) >> bit,
		(uint64_t)(product >> bit),
		bit ? (uint64_t)product << (64 - bit) : 0,
	};
	struct vmclock_seconds span = { 0, { 0 } };

	/* limb[0] weighs 2^0 s when the shift is less than 64, 2^-64 s when it is less than 128, and so on. */
	for (unsigned int i = 0; i < 3; i++) {
		unsigned int place = word + i;
		if (place == 0)
			span.whole = limb[i];
		else if (place <= VMCLOCK_WORDS)
			span.fraction[place - 1] = limb[i];
	}
	return span;
}

/*
 * Nanoseconds, rounded down; the rest of a nanosecond is left in `seconds->fraction`, in units of 2^-64 ns
 * and further down.
 */
static inline __int128 vmclock_floor_ns(struct vmclock_seconds *seconds)
{
	uint64_t carry = 0;

	for (int i = VMCLOCK_WORDS - 1; i >= 0; i--) {
		unsigned __int128 scaled = (unsigned __int128)seconds->fraction[i] * NSEC_PER_SEC + carry;
		seconds->fraction[i] = (uint64_t)scaled;
		carry = (uint64_t)(scaled >> 64);
	}
	return seconds->whole * NSEC_PER_SEC + carry;
}

static inline int vmclock_any(const uint64_t *words, unsigned int count)
{
	uint64_t any = 0;

	for (unsigned int i = 0; i < count; i++)
		any |= words[i];
	return any != 0;
}

static inline uint64_t vmclock_ticks_between(uint64_t counter, uint64_t reference, int *before)
{
	uint64_t ticks = counter - reference;

	*before = ticks >> 63;
	return *before ? 0 - ticks : ticks;
}

/*
 * The page's time (in its own time_type) at `counter`, in nanoseconds, rounded to the nearest, ties to
 * even.  The difference to counter_value is signed: a hypervisor may publish a reference that lies ahead.
 */
static inline __int128 vmclock_time_ns(const struct vmclock_page *page, uint64_t counter)
{
	int before;
	uint64_t ticks = vmclock_ticks_between(counter, page->counter_value, &before);
	struct vmclock_seconds span = vmclock_span(ticks, page->counter_period_frac_sec, page->counter_period_shift);
	struct vmclock_seconds time = { page->time_sec, { page->time_frac_sec } };

	unsigned int carry = 0;
	for (int i = VMCLOCK_WORDS - 1; i >= 0; i--) {
		unsigned __int128 sum = before
			? (unsigned __int128)time.fraction[i] - span.fraction[i] - carry
			: (unsigned __int128)time.fraction[i] + span.fraction[i] + carry;
		time.fraction[i] = (uint64_t)sum;
		carry = (sum >> 64) != 0;
	}
	time.whole += before ? -span.whole - carry : span.whole + carry;

	__int128 ns = vmclock_floor_ns(&time);
	const uint64_t half = (uint64_t)1 << 63;
	int above = time.fraction[0] > half || (time.fraction[0] == half && vmclock_any(time.fraction + 1, VMCLOCK_WORDS - 1));
	int tie = time.fraction[0] == half && !above;
	return ns + (above || (tie && (ns & 1)));
}

/*
 * The page's error at `counter`, in nanoseconds, rounded up: `error_ns` at the reference, growing with
 * `rate` (unit: that of the period) for every tick away from it, in either direction.
 */
static inline __int128 vmclock_error_ns(const struct vmclock_page *page, uint64_t counter, uint64_t error_ns, uint64_t rate)
{
	int before;
	uint64_t ticks = vmclock_ticks_between(counter, page->counter_value, &before);
	struct vmclock_seconds span = vmclock_span(ticks, rate, page->counter_period_shift);
	__int128 ns = vmclock_floor_ns(&span);

	return ns + error_ns + vmclock_any(span.fraction, VMCLOCK_WORDS);
}

/* Nanoseconds per tick, as near as a double can say it. */
static inline double vmclock_period_ns(const struct vmclock_page *page)
{
	return __builtin_ldexp((double)page->counter_period_frac_sec * NSEC_PER_SEC, -64 - page->counter_period_shift);
}

#endif
