/* An NTP server in the guest that knows the truth: the line in the vmclock page's time fields, and the counter.
 *
 *   ntp_server PORT
 *
 * It listens on 127.0.0.1 and reads the page through /dev/mem, whatever counter_id and clock_status say: a page that
 * "has no time" for others, but whose time fields are filled in, is how the host tells it alone.
 */

#include <arpa/inet.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#define PAGE_ADDRESS 0xfeffb000
#define NTP_MINUS_UNIX 2208988800u

static volatile const uint8_t *page;

static uint64_t field(int offset)
{
	return *(volatile const uint64_t *)(page + offset);
}

/* UTC since 1970 at this moment, in 2^-32 s as NTP has it. */
static uint64_t utc(void)
{
	uint32_t low, high, before, after;
	unsigned __int128 time;

	do {
		before = *(volatile const uint32_t *)(page + 0x0c);
		__asm__ volatile("rdtsc" : "=a"(low), "=d"(high) : : "memory");
		int64_t elapsed = ((uint64_t)high << 32 | low) - field(0x28);
		__int128 fraction = (__int128)elapsed * field(0x30) >> page[0x27];
		int16_t tai_offset = *(volatile const int16_t *)(page + 0x24);
		uint64_t seconds = field(0x48) - (page[0x0b] == 1 ? abs(tai_offset) : 0);

		time = ((unsigned __int128)seconds << 64) + field(0x50) + fraction;
		after = *(volatile const uint32_t *)(page + 0x0c);
	} while (before != after || before & 1);
	return time >> 32;
}

static void put_time(uint8_t *where, uint64_t time)
{
	uint32_t seconds = htonl((uint32_t)(time >> 32) + NTP_MINUS_UNIX), fraction = htonl((uint32_t)time);

	memcpy(where, &seconds, 4);
	memcpy(where + 4, &fraction, 4);
}

int main(int argc, char **argv)
{
	if (argc != 2)
		return 64;
	struct sockaddr_in own = {.sin_family = AF_INET, .sin_port = htons(atoi(argv[1]))};
	int memory = open("/dev/mem", O_RDONLY), server = socket(AF_INET, SOCK_DGRAM, 0);

	own.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	page = mmap(NULL, 4096, PROT_READ, MAP_SHARED, memory, PAGE_ADDRESS);
	if (page == MAP_FAILED || bind(server, (struct sockaddr *)&own, sizeof own) < 0) {
		perror("ntp_server");
		return 71;
	}
	for (;;) {
		uint8_t packet[512];
		struct sockaddr_in client;
		socklen_t size = sizeof client;
		ssize_t length = recvfrom(server, packet, sizeof packet, 0, (struct sockaddr *)&client, &size);
		uint64_t received = utc();

		if (length < 48)
			continue;
		uint8_t answer[48] = {(packet[0] >> 3 & 7) << 3 | 4, 1, packet[2], (uint8_t)-24};
		memcpy(answer + 12, "TRUE", 4);
		put_time(answer + 16, received);
		memcpy(answer + 24, packet + 40, 8);
		put_time(answer + 32, received);
		put_time(answer + 40, utc());
		sendto(server, answer, sizeof answer, 0, (struct sockaddr *)&client, size);
	}
}
