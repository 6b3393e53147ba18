/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/*
 * A whole VMM in C whose guest is under a policy, to copy and to put a guest of your own in.
 *
 *	cargo xtask capi --prefix /usr/local
 *	cc -o vmm vmm.c $(pkg-config --cflags --libs msrgate)
 *	./vmm policy.toml
 *
 * The guest reads three MSRs and writes each low byte to a port; then it halts.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <linux/kvm.h>
#include <msrgate.h>

#define PORT 0x10
#define ADDRESS 0x1000

/* `mov ecx, MSR; rdmsr; out PORT, al` for each MSR, and `hlt`, in real mode. */
static const unsigned char code[] = {
	0x66, 0xb9, 0x8b, 0, 0, 0, 0x0f, 0x32, 0xe6, PORT, /* IA32_BIOS_SIGN_ID */
	0x66, 0xb9, 0x74, 1, 0, 0, 0x0f, 0x32, 0xe6, PORT, /* IA32_SYSENTER_CS */
	0x66, 0xb9, 0x35, 0, 0, 0, 0x0f, 0x32, 0xe6, PORT, /* MSR_CORE_THREAD_COUNT */
	0xf4,
};

struct vcpu {
	int fd;
	unsigned cores;
	struct kvm_run *run;
};

static void die(const char *what)
{
	perror(what);
	exit(1);
}

static void refused(const char *what, const struct msrgate_error *error)
{
	fprintf(stderr, "%s: %s\n", what, error->message);
	exit(1);
}

/* Answers a policy's `handler = "cores"`, on the vCPU's thread. */
static int cores(void *opaque, uint32_t msr, int write, uint64_t *value)
{
	const struct vcpu *vcpu = opaque;

	(void)msr;
	if (write)
		return -1;
	*value = vcpu->cores;
	return 0;
}

static void put_guest(int vm, struct vcpu *vcpu)
{
	struct kvm_userspace_memory_region region;
	struct kvm_sregs sregs;
	struct kvm_regs regs;
	void *memory;

	memory = mmap(NULL, 0x1000, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (memory == MAP_FAILED)
		die("mmap");
	memcpy(memory, code, sizeof(code));
	memset(&region, 0, sizeof(region));
	region.guest_phys_addr = ADDRESS;
	region.memory_size = 0x1000;
	region.userspace_addr = (uintptr_t)memory;
	if (ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region) < 0)
		die("KVM_SET_USER_MEMORY_REGION");

	if (ioctl(vcpu->fd, KVM_GET_SREGS, &sregs) < 0)
		die("KVM_GET_SREGS");
	sregs.cs.base = 0;
	sregs.cs.selector = 0;
	if (ioctl(vcpu->fd, KVM_SET_SREGS, &sregs) < 0)
		die("KVM_SET_SREGS");
	memset(&regs, 0, sizeof(regs));
	regs.rip = ADDRESS;
	regs.rflags = 2;
	if (ioctl(vcpu->fd, KVM_SET_REGS, &regs) < 0)
		die("KVM_SET_REGS");
}

static int run(struct vcpu *vcpu, msrgate_vcpu *gate)
{
	struct msrgate_answer answer;

	for (;;) {
		if (ioctl(vcpu->fd, KVM_RUN, 0) < 0) {
			/* A signal. `kvm_run` says nothing new then. */
			if (errno == EINTR)
				continue;
			die("KVM_RUN");
		}
		if (msrgate_dispatch(gate, vcpu->run, &answer)) {
			printf("%s 0x%x: %s 0x%llx\n", answer.write ? "wrmsr" : "rdmsr", answer.msr,
			       answer.faulted ? "#GP" : "ok", (unsigned long long)answer.value);
			continue;
		}
		/* From here on, what a VMM does anyway. */
		switch (vcpu->run->exit_reason) {
		case KVM_EXIT_IO:
			printf("the guest has read 0x%x\n", ((unsigned char *)vcpu->run)[vcpu->run->io.data_offset]);
			break;
		case KVM_EXIT_HLT:
			return 0;
		default:
			/* An access that is denied: there is no handler for #GP in this guest. */
			printf("the guest stopped: exit %u\n", vcpu->run->exit_reason);
			return 2;
		}
	}
}

int main(int argc, char **argv)
{
	static const struct msrgate_handler handlers[] = { { "cores", cores } };
	struct vcpu vcpu = { -1, 4, NULL };
	struct msrgate_error error;
	msrgate_plan *plan = NULL;
	msrgate_gate *gate = NULL;
	msrgate_vcpu *vcpu_gate = NULL;
	int kvm, vm, size, end;

	if (argc != 2) {
		fprintf(stderr, "usage: vmm POLICY\n");
		return 1;
	}
	if (msrgate_load(argv[1], NULL, &plan, &error) < 0)
		refused(argv[1], &error);

	kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	if (kvm < 0)
		die("/dev/kvm");
	vm = ioctl(kvm, KVM_CREATE_VM, 0);
	if (vm < 0)
		die("KVM_CREATE_VM");
	/* Before a vCPU runs. */
	if (msrgate_install(plan, kvm, vm, handlers, 1, &gate, &error) < 0)
		refused("msrgate_install", &error);

	vcpu.fd = ioctl(vm, KVM_CREATE_VCPU, 0);
	size = ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
	if (vcpu.fd < 0 || size < 0)
		die("KVM_CREATE_VCPU");
	vcpu.run = mmap(NULL, (size_t)size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu.fd, 0);
	if (vcpu.run == MAP_FAILED)
		die("mmap");
	put_guest(vm, &vcpu);
	/* After KVM_SET_CPUID2, if there is one. */
	if (msrgate_vcpu_add(gate, vcpu.fd, 0, &vcpu, &vcpu_gate, &error) < 0)
		refused("msrgate_vcpu_add", &error);

	end = run(&vcpu, vcpu_gate);
	msrgate_free(plan, gate, vcpu_gate);
	return end;
}
