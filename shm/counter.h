/*
 * The CPU's counter.
 *
 * A vmclock page relates real time to one of two counters (vmclock-abi.h, counter_id): the x86 TSC
 * or the Arm virtual counter.  Both are readable from user space on Linux.
 *
 * A bracket is counter_edge(), a reading of the system clock, counter_edge().  An edge is not read before
 * what comes before it is done; that nothing after it runs ahead is the vDSO's own care for the clock, and
 * counter_barrier()'s at the end of the brackets.
 */
#ifndef REFCLOCK_COUNTER_H
#define REFCLOCK_COUNTER_H

#include <stdint.h>

#if defined(__x86_64__)

#include <cpuid.h>

#define COUNTER_ID 1 /* VMCLOCK_COUNTER_X86_TSC */

/* RDTSC may run ahead of earlier loads, and later ones ahead of it; LFENCE stops both. */
static inline void counter_barrier(void)
{
	__asm__ volatile("lfence" : : : "memory");
}

/* RDTSCP waits for what came before it, and is quicker than a fence; some emulated CPUs lack it. */
static inline int counter_has_rdtscp(void)
{
	static int known;
	unsigned int a, b, c, d;

	if (!known)
		known = __get_cpuid(0x80000001, &a, &b, &c, &d) && (d & 1u << 27) ? 1 : -1;
	return known > 0;
}

static inline uint64_t counter_edge(void)
{
	uint32_t low, high, processor;

	if (counter_has_rdtscp())
		__asm__ volatile("rdtscp" : "=a"(low), "=d"(high), "=c"(processor) : : "memory");
	else
		__asm__ volatile("lfence; rdtsc" : "=a"(low), "=d"(high) : : "memory");
	return (uint64_t)high << 32 | low;
}

#elif defined(__aarch64__)

#define COUNTER_ID 0 /* VMCLOCK_COUNTER_ARM_VCNT */

/* CNTVCT_EL0 may be read speculatively, earlier or later than its place in the program; ISB holds it. */
static inline void counter_barrier(void)
{
	__asm__ volatile("isb" : : : "memory");
}

static inline uint64_t counter_edge(void)
{
	uint64_t value;

	__asm__ volatile("isb; mrs %0, cntvct_el0" : "=r"(value) : : "memory");
	return value;
}

#else
#error "vmclock defines a counter for x86-64 and arm64 only"
#endif

/* The counter at this place in the program. */
static inline uint64_t counter_read(void)
{
	uint64_t value = counter_edge();
	counter_barrier();
	return value;
}

#endif
