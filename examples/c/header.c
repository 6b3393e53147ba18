/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/*
 * What changes in a VMM in C that takes a policy from a header, and links no library.
 *
 *	msrgate plan --emit c policy.toml > policy.h
 *	cc -o header header.c
 *	./header
 *
 * policy.toml is beside this file; its name is what the header's names begin with. The guest is that of vmm.c.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "policy.h"

#define PORT 0x10

/* `mov ecx, MSR; rdmsr; out PORT, al` for each MSR, and `hlt`, in real mode. */
static const unsigned char code[] = {
	0x66, 0xb9, 0x8b, 0, 0, 0, 0x0f, 0x32, 0xe6, PORT, /* IA32_BIOS_SIGN_ID */
	0x66, 0xb9, 0x74, 1, 0, 0, 0x0f, 0x32, 0xe6, PORT, /* IA32_SYSENTER_CS */
	0x66, 0xb9, 0x35, 0, 0, 0, 0x0f, 0x32, 0xe6, PORT, /* MSR_CORE_THREAD_COUNT */
	0xf4,
};

/* Answers the policy's `handler = "cores"`. */
static int cores(void *opaque, __u32 msr, int write, __u64 *value)
{
	(void)msr;
	if (write)
		return -1;
	*value = *(const unsigned *)opaque;
	return 0;
}

static void die(const char *what)
{
	perror(what);
	exit(1);
}

int main(void)
{
	static struct policy_state state; /* one for each vCPU */
	struct kvm_userspace_memory_region region;
	struct kvm_sregs sregs;
	struct kvm_regs regs;
	struct kvm_run *run;
	unsigned char *memory;
	unsigned count = 4;
	int kvm, vm, vcpu;

	kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	if (kvm < 0)
		die("/dev/kvm");
	vm = ioctl(kvm, KVM_CREATE_VM, 0);
	/* Before a vCPU runs. */
	errno = -policy_install(vm);
	if (errno)
		die("policy_install");

	memory = (unsigned char *)mmap(NULL, 0x1000, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	memcpy(memory, code, sizeof(code));
	memset(&region, 0, sizeof(region));
	region.guest_phys_addr = 0x1000;
	region.memory_size = 0x1000;
	region.userspace_addr = (uintptr_t)memory;
	if (ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region) < 0)
		die("KVM_SET_USER_MEMORY_REGION");
	vcpu = ioctl(vm, KVM_CREATE_VCPU, 0);
	run = (struct kvm_run *)mmap(NULL, (size_t)ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), PROT_READ | PROT_WRITE,
				     MAP_SHARED, vcpu, 0);
	if (vcpu < 0 || run == MAP_FAILED || ioctl(vcpu, KVM_GET_SREGS, &sregs) < 0)
		die("KVM_CREATE_VCPU");
	sregs.cs.base = 0;
	sregs.cs.selector = 0;
	memset(&regs, 0, sizeof(regs));
	regs.rip = 0x1000;
	regs.rflags = 2;
	if (ioctl(vcpu, KVM_SET_SREGS, &sregs) < 0 || ioctl(vcpu, KVM_SET_REGS, &regs) < 0)
		die("KVM_SET_REGS");

	/* After KVM_SET_CPUID2, if there is one. */
	state.opaque = &count;
	state.handlers[POLICY_HANDLER_CORES] = cores;
	if (policy_add_vcpu(vcpu))
		die("policy_add_vcpu");
	for (;;) {
		if (ioctl(vcpu, KVM_RUN, 0) < 0) {
			/* A signal. `kvm_run` says nothing new then. */
			if (errno == EINTR)
				continue;
			die("KVM_RUN");
		}
		if (policy_answer(run, &state, vcpu))
			continue;
		/* From here on, what a VMM does anyway. */
		if (run->exit_reason == KVM_EXIT_HLT)
			return 0;
		if (run->exit_reason != KVM_EXIT_IO) {
			fprintf(stderr, "the guest stopped: exit %u\n", run->exit_reason);
			return 2;
		}
		printf("the guest has read 0x%x\n", ((unsigned char *)run)[run->io.data_offset]);
	}
}
