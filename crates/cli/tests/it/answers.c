/* Answers accesses by the header that `plan --emit c` prints, in front of registers that answers.rs has too. */
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>

#define REGISTERS 512

static unsigned long long registers[REGISTERS];

/* KVM_GET_MSRS and KVM_SET_MSRS of one MSR: one of eight does not exist. */
static int kernel(int fd, unsigned long request, ...)
{
	unsigned long long *one;
	va_list rest;

	(void)fd;
	va_start(rest, request);
	one = va_arg(rest, unsigned long long *);
	va_end(rest);
	if (one[0] != 1 || one[1] % 8 == 5)
		return 0;
	if (request == 0xc008ae88ul)
		one[2] = registers[one[1] % REGISTERS];
	else if (request == 0x4008ae89ul)
		registers[one[1] % REGISTERS] = one[2];
	else
		abort();
	return 1;
}

#define ioctl kernel
#include "policy.h"

static int handler(void *opaque, __u32 msr, int write, __u64 *value)
{
	(void)opaque;
	if (write)
		return *value % 2 == 1;
	*value = msr ^ 0x1234u;
	return msr % 2 == 1;
}

static int host(void *opaque, __u32 msr, __u64 *value)
{
	(void)opaque;
	*value = 3ull * msr;
	return msr % 4 == 1;
}

int main(void)
{
	static struct policy_state state;
	static struct kvm_run run;
	unsigned write, msr, reason, index;
	unsigned long long value;

	for (index = 0; index + 1 <= POLICY_HANDLERS; index++)
		state.handlers[index] = handler;
	state.host = host;
	for (index = 0; index < REGISTERS; index++)
		registers[index] = 0x0101010101010101ull * (index & 0xff);
	while (scanf("%u %x %u %llx", &write, &msr, &reason, &value) == 4) {
		run.exit_reason = write ? KVM_EXIT_X86_WRMSR : KVM_EXIT_X86_RDMSR;
		run.msr.index = msr;
		run.msr.reason = reason;
		run.msr.data = write ? value : 0;
		run.msr.error = 0;
		if (policy_answer(&run, &state, 0) != 1 || run.exit_reason == KVM_EXIT_X86_RDMSR)
			return 1;
		/* An exit that was answered is none any more. */
		if (policy_answer(&run, &state, 0) != 0)
			return 2;
		if (run.msr.error)
			printf("fault\n");
		else if (write)
			printf("done\n");
		else
			printf("%llx\n", (unsigned long long)run.msr.data);
	}
	return 0;
}
