package FakeDaemon;

# A daemon under a test's control. Each test gives it code for its connections. The code runs in a
# child process, for one connection after the other, with the connection and its number from 1.

use strict;
use warnings;

use CPANBridge::JSON;
use File::Temp ();
use IO::Socket::UNIX;
use POSIX ();
use Socket qw(SOCK_STREAM);
use Time::HiRes ();

sub start {
    my ($class, $serve, %options) = @_;
    my $folder = $options{folder} || File::Temp->newdir;
    my $self   = bless {
        folder => $folder,
        path   => "$folder/fake.sock",
        log    => "$folder/log",
        tester => $$,
    }, $class;
    unlink $self->{path};
    # Listening before the fork: it can be connected to as soon as this returns.
    my $listening = IO::Socket::UNIX->new(
        Type => SOCK_STREAM, Local => $self->{path}, Listen => $options{backlog} || 16,
    ) or die "listen: $!";
    defined($self->{pid} = fork) or die "fork: $!";
    if (!$self->{pid}) {
        $SIG{PIPE} = 'IGNORE';
        $SIG{ALRM} = 'DEFAULT';
        alarm 120;    # ends it, whatever happens to the test
        eval { $self->_serve($listening, $serve); 1 } or print {*STDERR} "# fake daemon: $@";
        POSIX::_exit(0);
    }
    return $self;
}

sub _serve {
    my ($self, $listening, $serve) = @_;
    my $number = 0;
    while (my $socket = $listening->accept) {
        binmode $socket;    # overrides -C and PERL_UNICODE
        my $connection = bless { socket => $socket, log => $self->{log} }, 'FakeDaemon::Connection';
        eval { $serve->($connection, ++$number); 1 } or $@ eq "gone\n" or die $@;
        close $socket;
    }
    return;
}

sub path { return $_[0]{path} }

# What the connections recorded, by `note` or because they read a request.
sub noted {
    my ($self) = @_;
    open my $log, '<', $self->{log} or return;
    chomp(my @lines = <$log>);
    return @lines;
}

sub wait_until_noted {
    my ($self, $line) = @_;
    for (1 .. 3000) {
        return 1 if grep { $_ eq $line } $self->noted;
        Time::HiRes::sleep(0.01);
    }
    return 0;
}

sub stop {
    my ($self) = @_;
    my $pid = delete $self->{pid} or return;
    local $?;
    kill 'KILL', $pid;
    waitpid $pid, 0;
    unlink $self->{path};
    return;
}

# A thread's copy would stop the daemon when the thread ends.
sub CLONE_SKIP { return 1 }

sub DESTROY {
    my ($self) = @_;
    $self->stop if $self->{tester} == $$;
    return;
}

package FakeDaemon::Connection;

use strict;
use warnings;

sub note {
    my ($self, $line) = @_;
    utf8::encode($line);
    open my $log, '>>', $self->{log} or die $!;
    syswrite $log, "$line\n";
    close $log;
    return;
}

sub read_bytes {
    my ($self, $count) = @_;
    my $bytes = '';
    while (length $bytes < $count) {
        sysread $self->{socket}, $bytes, $count - length $bytes, length $bytes or die "gone\n";
    }
    return $bytes;
}

# The next request, recorded as "request FUNCTION"; dies if the client has closed.
sub read_request {
    my ($self) = @_;
    my $request = CPANBridge::JSON::decode($self->read_bytes(unpack 'N', $self->read_bytes(4)));
    $self->note("request $request->{function}");
    return $request;
}

sub send_bytes {
    my ($self, $bytes) = @_;
    while (length $bytes) {
        my $count = syswrite $self->{socket}, $bytes or die "gone\n";
        substr $bytes, 0, $count, '';
    }
    return;
}

sub frame {
    my ($self, $body) = @_;
    return pack('N', length $body) . $body;
}

sub success {
    my ($self, $request, $result) = @_;
    return $self->frame(CPANBridge::JSON::encode(
        { success => \1, result => $result, request_id => $request->{request_id} }
    ));
}

# Sends the result, by default the params.
sub reply {
    my ($self, $request, @result) = @_;
    return $self->send_bytes($self->success($request, @result ? $result[0] : $request->{params}));
}

sub fail {
    my ($self, $request, %fields) = @_;
    return $self->send_bytes($self->frame(CPANBridge::JSON::encode(
        { success => \0, request_id => $request->{request_id}, %fields }
    )));
}

sub no_more_requests { return $_[0]->send_bytes(pack 'N', 0) }

# Answers all requests until the client closes.
sub echo {
    my ($self) = @_;
    while (1) {
        my $request = $self->read_request;
        $self->reply($request);
    }
}

# Returns once the client has closed.
sub wait_for_end {
    my ($self) = @_;
    1 while sysread $self->{socket}, my $bytes, 65536;
    return;
}

1;
