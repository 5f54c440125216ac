/*
 * One writer as fast as it can, and readers, over vmclock_publish() and vmclock_copy().
 *
 *     page_torture READS map|pread [READERS]
 *
 * Every word of the page is a function of its disruption marker, so that a copy of two updates shows.  A line
 * for each reader; the exit status is 1 when a torn copy was seen.
 */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>

#include "vmclock_page.h"

enum { WORDS = sizeof(struct vmclock_page) / 8, MARKER = 2, SEQUENCE = 1 };

/* Reads while the writer has no CPU prove nothing: so many updates must be seen by each reader. */
enum { CONTESTED = 2000 };

static uint64_t check_value(uint64_t n, unsigned int word)
{
	uint64_t value = (n + word) * UINT64_C(0x9e3779b97f4a7c15);

	return value ^ value >> 29;
}

static void fill(struct vmclock_page *page, uint64_t n)
{
	uint64_t words[WORDS];

	for (unsigned int i = 0; i < WORDS; i++)
		words[i] = check_value(n, i);
	words[MARKER] = n;
	memcpy(page, words, sizeof(words));
}

static int is_torn(const struct vmclock_page *page)
{
	uint64_t words[WORDS], mask;

	memcpy(words, page, sizeof(words));
	for (unsigned int i = 0; i < WORDS; i++) {
		mask = i == SEQUENCE ? UINT32_MAX : UINT64_MAX; /* its upper half is the sequence itself */
		if (i != MARKER && (words[i] ^ check_value(words[MARKER], i)) & mask)
			return 1;
	}
	return page->seq_count & 1;
}

static pid_t start(void)
{
	pid_t pid = fork();

	if (pid < 0)
		exit(2);
	if (pid == 0)
		prctl(PR_SET_PDEATHSIG, SIGKILL);
	return pid;
}

/* Pauses up to as long as a copy takes: without, no reader would ever get a copy while the writer runs. */
static void write_for_ever(struct vmclock_page *page, unsigned int longest_pause)
{
	struct vmclock_page next;

	for (uint64_t n = 1;; n++) {
		fill(&next, n);
		vmclock_publish(page, &next);
		for (unsigned int pause = check_value(n, 0) % longest_pause; pause; pause--)
			__asm__ volatile("" : : : "memory");
	}
}

static int read_many(const struct vmclock_source *source, long reads)
{
	struct vmclock_page copy;
	uint64_t before = 0;
	long torn = 0, stalled = 0, distinct = 0, backwards = 0;

	for (long i = 0; i < reads || distinct < CONTESTED; i++) {
		int error = vmclock_copy(source, &copy);

		if (error == ETIMEDOUT) { /* the writer may lose its CPU for long */
			stalled++;
			continue;
		}
		if (error)
			return 2;
		torn += is_torn(&copy);
		distinct += copy.disruption_marker != before;
		backwards += copy.disruption_marker < before;
		before = copy.disruption_marker;
	}
	printf("reads %ld distinct %ld stalled %ld torn %ld backwards %ld\n", reads, distinct, stalled, torn, backwards);
	return torn || backwards;
}

int main(int count, char **arguments)
{
	if (count < 3)
		return 2;
	long reads = atol(arguments[1]);
	int readers = count > 3 ? atoi(arguments[3]) : 1, worst = 0, status;
	struct vmclock_source source = { .fd = memfd_create("page", 0) };

	if (ftruncate(source.fd, 4096))
		return 2;
	struct vmclock_page *page = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, source.fd, 0);
	struct vmclock_page first;
	fill(&first, 0);
	vmclock_publish(page, &first);
	if (!strcmp(arguments[2], "map"))
		source.map = mmap(NULL, 4096, PROT_READ, MAP_SHARED, source.fd, 0);

	pid_t writer = start();
	if (writer == 0)
		write_for_ever(page, source.map ? 256 : 8192);
	for (int i = 0; i < readers; i++)
		if (start() == 0)
			return read_many(&source, reads);
	for (int i = 0; i < readers; i++) {
		wait(&status); /* the writer does not end by itself */
		if (!WIFEXITED(status) || WEXITSTATUS(status) > worst)
			worst = WIFEXITED(status) ? WEXITSTATUS(status) : 2;
	}
	kill(writer, SIGKILL);
	waitpid(writer, &status, 0);
	return worst;
}
