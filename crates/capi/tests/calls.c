/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/*
 * Every call of msrgate.h, on live KVM. `cargo xtask capi --check` compiles it as C and as C++, and runs it under memory checkers.
 *
 * Prints a line for each test, and `skipped: REASON` where /dev/kvm does not open.
 */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <linux/kvm.h>
#include <msrgate.h>

#define MICROCODE 0x8bu
#define SYSENTER_ESP 0x175u
#define LSTAR 0xc0000082u
#define UNKNOWN 0xdeadbeefu

/* Where the guest's code lies: an access each, and what #GP leads to. */
#define RDMSR 0x500
#define WRMSR 0x510
#define FAULT 0x600

#define THREADS 4
#define ROUNDS 300

#define CHECK(condition) check(!!(condition), #condition, __LINE__)

static int kvm;
static char directory[] = "/tmp/msrgate-capi-XXXXXX";

static void check(int holds, const char *what, int line)
{
	if (holds)
		return;
	fprintf(stderr, "calls.c:%d: failed: %s\n", line, what);
	exit(1);
}

struct vm {
	int fd;
	unsigned char *memory;
	msrgate_gate *gate;
};

struct vcpu {
	int fd;
	uint64_t number;
	unsigned asked;
	struct kvm_run *run;
	msrgate_vcpu *gate;
};

/* The path of a new file with a policy. */
static char *policy(const char *name, const char *text)
{
	char *path = (char *)malloc(256);
	FILE *file;

	snprintf(path, 256, "%s/%s", directory, name);
	file = fopen(path, "w");
	CHECK(file != NULL);
	fputs(text, file);
	fclose(file);
	return path;
}

static msrgate_plan *load(const char *name, const char *text)
{
	struct msrgate_error error;
	msrgate_plan *plan = NULL;
	char *path = policy(name, text);

	if (msrgate_load(path, NULL, &plan, &error) != 0) {
		fprintf(stderr, "%s\n", error.message);
		exit(1);
	}
	unlink(path);
	free(path);
	return plan;
}

static struct vm new_vm(void)
{
	static const unsigned char rdmsr[] = { 0x0f, 0x32, 0xf4 }, wrmsr[] = { 0x0f, 0x30, 0xf4 };
	struct kvm_userspace_memory_region region;
	struct vm vm = { -1, NULL, NULL };

	vm.fd = ioctl(kvm, KVM_CREATE_VM, 0);
	CHECK(vm.fd >= 0);
	vm.memory = (unsigned char *)mmap(NULL, 0x10000, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	CHECK(vm.memory != MAP_FAILED);
	/* The vector of #GP in real mode. */
	vm.memory[13 * 4 + 1] = FAULT >> 8;
	vm.memory[FAULT] = 0xf4;
	memcpy(vm.memory + RDMSR, rdmsr, sizeof(rdmsr));
	memcpy(vm.memory + WRMSR, wrmsr, sizeof(wrmsr));
	memset(&region, 0, sizeof(region));
	region.memory_size = 0x10000;
	region.userspace_addr = (uintptr_t)vm.memory;
	CHECK(ioctl(vm.fd, KVM_SET_USER_MEMORY_REGION, &region) == 0);
	return vm;
}

static struct vcpu new_vcpu(const struct vm *vm, unsigned long id)
{
	struct vcpu vcpu = { -1, id, 0, NULL, NULL };
	struct kvm_sregs sregs;
	void *run;

	vcpu.fd = ioctl(vm->fd, KVM_CREATE_VCPU, id);
	CHECK(vcpu.fd >= 0);
	run = mmap(NULL, (size_t)ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), PROT_READ | PROT_WRITE, MAP_SHARED, vcpu.fd, 0);
	CHECK(run != MAP_FAILED);
	vcpu.run = (struct kvm_run *)run;
	CHECK(ioctl(vcpu.fd, KVM_GET_SREGS, &sregs) == 0);
	sregs.cs.base = 0;
	sregs.cs.selector = 0;
	CHECK(ioctl(vcpu.fd, KVM_SET_SREGS, &sregs) == 0);
	return vcpu;
}

/* Two structures may not move once the library has their address; the caller adds the gate. */
static void add(struct vm *vm, struct vcpu *vcpu)
{
	struct msrgate_error error;

	CHECK(msrgate_vcpu_add(vm->gate, vcpu->fd, (uint32_t)vcpu->number, vcpu, &vcpu->gate, &error) == 0);
}

static void close_vm(struct vm *vm)
{
	munmap(vm->memory, 0x10000);
	close(vm->fd);
}

static void close_vcpu(struct vcpu *vcpu)
{
	munmap(vcpu->run, (size_t)ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0));
	close(vcpu->fd);
}

/* Makes one access in the guest: 1 where it faulted. A read's value is put into *value. The last answer into *answer. */
static int access_msr(struct vcpu *vcpu, uint32_t msr, int write, uint64_t *value, struct msrgate_answer *answer)
{
	struct kvm_regs regs;

	memset(&regs, 0, sizeof(regs));
	regs.rip = write ? WRMSR : RDMSR;
	regs.rflags = 2;
	regs.rsp = 0x8000 + 0x100 * vcpu->number;
	regs.rcx = msr;
	regs.rax = (uint32_t)*value;
	regs.rdx = *value >> 32;
	CHECK(ioctl(vcpu->fd, KVM_SET_REGS, &regs) == 0);
	for (;;) {
		int ran = ioctl(vcpu->fd, KVM_RUN, 0);

		if (ran < 0 && (errno == EINTR || errno == EAGAIN))
			continue;
		CHECK(ran == 0);
		if (vcpu->gate != NULL && msrgate_dispatch(vcpu->gate, vcpu->run, answer) == 1)
			continue;
		CHECK(vcpu->run->exit_reason == KVM_EXIT_HLT);
		break;
	}
	CHECK(ioctl(vcpu->fd, KVM_GET_REGS, &regs) == 0);
	if (regs.rip == FAULT + 1)
		return 1;
	if (!write)
		*value = (regs.rdx & 0xffffffffu) << 32 | (regs.rax & 0xffffffffu);
	return 0;
}

static int reads(struct vcpu *vcpu, uint32_t msr, uint64_t expected)
{
	uint64_t value = 0;

	return access_msr(vcpu, msr, 0, &value, NULL) == 0 && value == expected;
}

static int writes(struct vcpu *vcpu, uint32_t msr, uint64_t value)
{
	return access_msr(vcpu, msr, 1, &value, NULL) == 0;
}

/* Reads give the vCPU's number above the MSR; a write of 0 faults. */
static int number(void *opaque, uint32_t msr, int write, uint64_t *value)
{
	struct vcpu *vcpu = (struct vcpu *)opaque;

	vcpu->asked++;
	if (write)
		return *value == 0;
	*value = vcpu->number << 32 | msr;
	return 0;
}

static const struct msrgate_handler handlers[] = { { "number", number } };

static const char remembering[] = "version = 1\ndefault = \"allow\"\n"
				  "[[rule]]\nmsr = \"IA32_SYSENTER_ESP\"\nread = { shadow = 7 }\nwrite = \"shadow\"\n"
				  "[[rule]]\nmsr = \"IA32_LSTAR\"\nwrite = { once = true }\n";

static void what_cannot_be_loaded_is_told(void)
{
	struct msrgate_error error;
#ifndef __cplusplus
	struct kvm_cpuid2 *cpuid;
#endif
	msrgate_plan *plan = NULL;
	char *path;

	CHECK(msrgate_load("/nowhere.toml", NULL, &plan, &error) == -EINVAL);
	CHECK(strstr(error.message, "/nowhere.toml") != NULL);
	CHECK(msrgate_load(NULL, NULL, &plan, &error) == -EINVAL);
	CHECK(msrgate_load("/nowhere.toml", NULL, NULL, NULL) == -EINVAL);

	path = policy("wrong.toml", "version = 1\ndefault = \"deny\"\n[[rule]]\nmsr = \"IA32_LSTRA\"\nread = \"alow\"\n");
	CHECK(msrgate_load(path, NULL, &plan, &error) == -EINVAL);
	CHECK(strstr(error.message, "wrong.toml:4:7: ") != NULL && strstr(error.message, "wrong.toml:5:8: ") != NULL);
	unlink(path);
	free(path);

	path = policy("model.toml", "version = 1\ndefault = \"allow\"\nvalid = \"cpu-model\"\n");
	CHECK(msrgate_load(path, NULL, &plan, &error) == -EINVAL);
	CHECK(strstr(error.message, "CPUID") != NULL);
#ifndef __cplusplus /* The kernel's structure has another layout there. */
	cpuid = (struct kvm_cpuid2 *)calloc(1, sizeof(*cpuid) + 100 * sizeof(struct kvm_cpuid_entry2));
	cpuid->nent = 100;
	CHECK(ioctl(kvm, KVM_GET_SUPPORTED_CPUID, cpuid) == 0);
	CHECK(msrgate_load(path, cpuid, &plan, &error) == 0);
	cpuid->nent = 1u << 20;
	msrgate_free(plan, NULL, NULL);
	CHECK(msrgate_load(path, cpuid, &plan, &error) == -E2BIG);
	free(cpuid);
#endif
	unlink(path);
	free(path);

	CHECK(msrgate_load("msrgate:qemu", NULL, &plan, &error) == 0);
	msrgate_free(plan, NULL, NULL);
}

static void a_failed_install_changes_nothing(void)
{
	static const struct msrgate_handler broken[] = { { "number", NULL } };
	msrgate_plan *plan = load("p.toml", "version = 1\ndefault = \"allow\"\n[[rule]]\nmsr = 0x175\nread = { handler = \"number\" }\n");
	struct vm vm = new_vm();
	struct vcpu vcpu = new_vcpu(&vm, 0);
	struct msrgate_error error;
	msrgate_vcpu *none = NULL;

	CHECK(msrgate_install(plan, kvm, vm.fd, NULL, 0, &vm.gate, &error) == -ENOENT);
	CHECK(strstr(error.message, "`number`") != NULL);
	CHECK(msrgate_install(plan, kvm, vm.fd, NULL, 1, &vm.gate, &error) == -EINVAL);
	CHECK(msrgate_install(plan, kvm, vm.fd, broken, 1, &vm.gate, &error) == -EINVAL);
	CHECK(msrgate_install(NULL, kvm, vm.fd, handlers, 1, &vm.gate, &error) == -EINVAL);
	CHECK(msrgate_install(plan, kvm, vm.fd, handlers, 1, NULL, &error) == -EINVAL);
	CHECK(msrgate_install(plan, kvm, -1, handlers, 1, &vm.gate, NULL) == -EBADF);
	CHECK(msrgate_install(plan, -1, vm.fd, handlers, 1, &vm.gate, NULL) == -EBADF);
	CHECK(vm.gate == NULL);
	CHECK(reads(&vcpu, SYSENTER_ESP, 0));

	CHECK(msrgate_install(plan, kvm, vm.fd, handlers, 1, &vm.gate, &error) == 0);
	CHECK(msrgate_vcpu_add(vm.gate, vm.fd, 0, NULL, &none, &error) == -EINVAL);
	CHECK(strstr(error.message, "vCPU") != NULL && none == NULL);
	CHECK(msrgate_vcpu_add(NULL, vcpu.fd, 0, NULL, &none, &error) == -EINVAL);
	CHECK(msrgate_replace(vm.gate, NULL, &error) == -EINVAL);
	add(&vm, &vcpu);
	CHECK(reads(&vcpu, SYSENTER_ESP, SYSENTER_ESP));
	/* In any order. */
	msrgate_free(NULL, vm.gate, NULL);
	CHECK(reads(&vcpu, SYSENTER_ESP, SYSENTER_ESP));
	msrgate_free(plan, NULL, NULL);
	CHECK(reads(&vcpu, SYSENTER_ESP, SYSENTER_ESP));
	msrgate_free(NULL, NULL, vcpu.gate);
	msrgate_free(NULL, NULL, NULL);
	close_vcpu(&vcpu);
	close_vm(&vm);
}

static void an_answer_says_what_the_guest_got_and_why(void)
{
	msrgate_plan *plan = load("p.toml", "version = 1\ndefault = \"allow\"\n"
					    "[[rule]]\nmsr = 0x8b\nread = { value = \"0x1122334455667788\" }\nwrite = \"ignore\"\n"
					    "[[rule]]\nmsr = 0x175\nread = { handler = \"number\" }\nwrite = { handler = \"number\" }\nlog = \"first\"\n"
					    "[[rule]]\nmsr = 0xdeadbeef\nread = \"deny\"\n");
	struct vm vm = new_vm();
	struct vcpu vcpu = new_vcpu(&vm, 3);
	struct msrgate_answer answer;
	struct msrgate_stats stats;
	struct msrgate_error error;
	uint64_t value = 0;

	CHECK(msrgate_install(plan, kvm, vm.fd, handlers, 1, &vm.gate, &error) == 0);
	add(&vm, &vcpu);
	CHECK(access_msr(&vcpu, MICROCODE, 0, &value, &answer) == 0 && value == 0x1122334455667788u);
	CHECK(answer.msr == MICROCODE && !answer.write && !answer.faulted && answer.why == MSRGATE_WHY_NONE);
	CHECK(answer.rule == 0 && answer.value == value && !answer.log);
	value = 5;
	CHECK(access_msr(&vcpu, MICROCODE, 1, &value, &answer) == 0);
	CHECK(answer.write && !answer.faulted && answer.value == 5);
	CHECK(access_msr(&vcpu, SYSENTER_ESP, 0, &value, &answer) == 0 && value == (3ull << 32 | SYSENTER_ESP));
	CHECK(answer.rule == 1 && answer.log == 1);
	value = 0;
	CHECK(access_msr(&vcpu, SYSENTER_ESP, 1, &value, &answer) == 1);
	CHECK(answer.faulted && answer.why == MSRGATE_WHY_HANDLER_FAULT && answer.log == 1);
	CHECK(access_msr(&vcpu, SYSENTER_ESP, 1, &value, &answer) == 1 && answer.log == 0);
	CHECK(vcpu.asked == 3);
	CHECK(access_msr(&vcpu, UNKNOWN, 0, &value, &answer) == 1);
	msrgate_stats(vm.gate, &stats);
	CHECK(stats.writes == 3 && stats.failures == 2 && stats.faults >= 2 && stats.reads >= 2);
	msrgate_stats(NULL, &stats);
	/* Another exit is not touched. */
	CHECK(vcpu.run->exit_reason == KVM_EXIT_HLT);
	CHECK(msrgate_dispatch(vcpu.gate, vcpu.run, &answer) == 0 && vcpu.run->exit_reason == KVM_EXIT_HLT);
	CHECK(msrgate_dispatch(NULL, vcpu.run, &answer) == 0 && msrgate_dispatch(vcpu.gate, NULL, NULL) == 0);
	msrgate_free(plan, vm.gate, vcpu.gate);
	close_vcpu(&vcpu);
	close_vm(&vm);
}

static void what_a_vcpu_remembers_is_saved_restored_and_rolled_back(void)
{
	msrgate_plan *plan = load("p.toml", remembering), *other = load("q.toml", "version = 1\ndefault = \"allow\"\n");
	struct vm here = new_vm(), there = new_vm();
	struct vcpu from = new_vcpu(&here, 0), to = new_vcpu(&there, 0);
	struct msrgate_error error;
	char text[512], small[8];
	long needed;

	CHECK(msrgate_install(plan, kvm, here.fd, NULL, 0, &here.gate, &error) == 0);
	CHECK(msrgate_install(plan, kvm, there.fd, NULL, 0, &there.gate, &error) == 0);
	add(&here, &from);
	add(&there, &to);
	CHECK(reads(&from, SYSENTER_ESP, 7) && writes(&from, SYSENTER_ESP, 8) && reads(&from, SYSENTER_ESP, 8));

	needed = msrgate_save(from.gate, from.run, NULL, 0, &error);
	CHECK(needed > 0 && needed < (long)sizeof(text));
	memset(small, 'x', sizeof(small));
	CHECK(msrgate_save(from.gate, from.run, small, sizeof(small), &error) == needed && small[0] == 'x');
	CHECK(msrgate_save(from.gate, NULL, text, sizeof(text), &error) == needed);
	CHECK(strncmp(text, "msrgate-state ", 14) == 0);
	CHECK(msrgate_save(NULL, NULL, text, sizeof(text), &error) == -EINVAL);
	CHECK(msrgate_save(from.gate, NULL, NULL, 5, &error) == -EINVAL);

	CHECK(msrgate_restore(to.gate, text, (size_t)needed, 0, &error) == 0);
	CHECK(reads(&to, SYSENTER_ESP, 8));
	CHECK(msrgate_restore(to.gate, text, (size_t)needed, 2, &error) == -EINVAL);
	CHECK(msrgate_restore(to.gate, text, (size_t)needed - 1, 0, &error) == -EBADMSG);
	CHECK(msrgate_restore(to.gate, NULL, 0, 0, &error) == -EINVAL);

	/* Locked since: a restore leaves it, a rollback opens it. */
	CHECK(writes(&to, LSTAR, 0x1000) && !writes(&to, LSTAR, 0x1000));
	CHECK(msrgate_restore(to.gate, text, (size_t)needed, 0, &error) == 0 && !writes(&to, LSTAR, 0x1000));
	CHECK(msrgate_restore(to.gate, text, (size_t)needed, MSRGATE_ROLLBACK, &error) == 0 && writes(&to, LSTAR, 0x1000));

	CHECK(msrgate_replace(there.gate, other, &error) == 0);
	CHECK(msrgate_restore(to.gate, text, (size_t)needed, 0, &error) == -ESTALE);
	CHECK(strstr(error.message, "policy") != NULL);
	msrgate_free(plan, here.gate, from.gate);
	msrgate_free(other, there.gate, to.gate);
	close_vcpu(&from);
	close_vcpu(&to);
	close_vm(&here);
	close_vm(&there);
}

static void *guest(void *argument)
{
	struct vcpu *vcpu = (struct vcpu *)argument;
	unsigned round;

	for (round = 0; round < ROUNDS; round++) {
		uint64_t value = 0;

		CHECK(access_msr(vcpu, MICROCODE, 0, &value, NULL) == 0 && (value == 1 || value == 2));
		CHECK(reads(vcpu, SYSENTER_ESP, vcpu->number << 32 | SYSENTER_ESP));
	}
	return NULL;
}

static void four_vcpus_are_answered_while_the_plan_is_replaced(void)
{
	static const char text[] = "version = 1\ndefault = \"allow\"\n"
				   "[[rule]]\nmsr = 0x8b\nread = { value = %d }\n"
				   "[[rule]]\nmsr = 0x175\nread = { handler = \"number\" }\n";
	msrgate_plan *plans[2];
	struct vcpu vcpus[THREADS];
	pthread_t threads[THREADS];
	struct vm vm = new_vm();
	struct msrgate_error error;
	struct msrgate_stats stats;
	char one[256];
	int index, replaced;

	for (index = 0; index < 2; index++) {
		snprintf(one, sizeof(one), text, index + 1);
		plans[index] = load("p.toml", one);
	}
	CHECK(msrgate_install(plans[0], kvm, vm.fd, handlers, 1, &vm.gate, &error) == 0);
	for (index = 0; index < THREADS; index++) {
		vcpus[index] = new_vcpu(&vm, (unsigned long)index);
		add(&vm, &vcpus[index]);
	}
	for (index = 0; index < THREADS; index++)
		CHECK(pthread_create(&threads[index], NULL, guest, &vcpus[index]) == 0);
	for (replaced = 1; replaced <= 20; replaced++)
		CHECK(msrgate_replace(vm.gate, plans[replaced % 2], &error) == 0);
	for (index = 0; index < THREADS; index++)
		CHECK(pthread_join(threads[index], NULL) == 0);
	msrgate_stats(vm.gate, &stats);
	CHECK(stats.reads == 2ull * THREADS * ROUNDS && stats.writes == 0 && stats.faults == 0);
	for (index = 0; index < THREADS; index++) {
		CHECK(vcpus[index].asked == ROUNDS);
		msrgate_free(NULL, NULL, vcpus[index].gate);
		close_vcpu(&vcpus[index]);
	}
	msrgate_free(plans[0], vm.gate, NULL);
	msrgate_free(plans[1], NULL, NULL);
	close_vm(&vm);
}

static const struct {
	const char *name;
	void (*run)(void);
} tests[] = {
#define TEST(name) { #name, name }
	TEST(what_cannot_be_loaded_is_told),
	TEST(a_failed_install_changes_nothing),
	TEST(an_answer_says_what_the_guest_got_and_why),
	TEST(what_a_vcpu_remembers_is_saved_restored_and_rolled_back),
	TEST(four_vcpus_are_answered_while_the_plan_is_replaced),
};

int main(void)
{
	size_t index;

	kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	if (kvm < 0) {
		printf("skipped: /dev/kvm: %s\n", strerror(errno));
		return 0;
	}
	CHECK(mkdtemp(directory) != NULL);
	for (index = 0; index < sizeof(tests) / sizeof(tests[0]); index++) {
		tests[index].run();
		printf("test %s ... ok\n", tests[index].name);
	}
	close(kvm);
	rmdir(directory);
	return 0;
}
