use strict;
use warnings;

use Config;
use Fcntl ();
use POSIX ();
use Test::More;

use lib 't/lib';
use CPANBridge;
use FakeDaemon;

sub handle { my $connection = $_[0]{_state}{connection}; return $connection && $connection->{handle} }

# A daemon that serves each connection in a process, which replies with the connection's number.
my $daemon = FakeDaemon->start(
    sub {
        my ($connection, $number) = @_;
        local $SIG{CHLD} = 'IGNORE';
        return if fork;
        eval {
            while (1) {
                my $request = $connection->read_request;
                $connection->reply($request, [ $number, $request->{params} ]);
            }
        };
        POSIX::_exit(0);
    }
);
my $bridge = CPANBridge->new(socket => $daemon->path, timeout => 30);

is_deeply($bridge->call_python('m', 'f', 'a'), [ 1, 'a' ], 'the first connection');
ok(fcntl(handle($bridge), Fcntl::F_GETFD(), 0) & Fcntl::FD_CLOEXEC(), 'is closed on exec');

subtest 'a child has a connection of its own' => sub {
    pipe my $from_child, my $to_parent or die $!;
    defined(my $pid = fork) or die $!;
    if (!$pid) {
        my @seen = map { $bridge->call_python('m', 'f', 'child')->[0] } 1 .. 20;
        syswrite $to_parent, "@seen\n";
        $bridge->disconnect;
        POSIX::_exit(0);
    }
    my @seen = map { $bridge->call_python('m', 'f', 'parent') } 1 .. 20;
    is_deeply(\@seen, [ map { [ 1, 'parent' ] } 1 .. 20 ], 'the parent keeps its own meanwhile');
    my $line = <$from_child>;
    like($line, qr/\A2(?: 2){19}\n\z/, 'the child has another, for all its calls');
    waitpid $pid, 0;
    is_deeply($bridge->call_python('m', 'f', 'b'), [ 1, 'b' ], "the child's end does not end the parent's");
};

subtest 'a child that makes no call' => sub {
    defined(my $pid = fork) or die $!;
    if (!$pid) { undef $bridge; exit_quietly() }
    waitpid $pid, 0;
    is_deeply($bridge->call_python('m', 'f', 'c'), [ 1, 'c' ], "leaves the parent's connection alone");
};

sub exit_quietly { POSIX::_exit(0) }

subtest 'a child that ends as scripts do' => sub {
    defined(my $pid = fork) or die $!;
    if (!$pid) {
        $daemon->{tester} = 0;    # its copy is not to stop the daemon
        Test::More->builder->no_ending(1);
        $bridge->call_python('m', 'f', 'child');
        exit 0;
    }
    waitpid $pid, 0;
    is_deeply($bridge->call_python('m', 'f', 'd'), [ 1, 'd' ], "leaves the parent's connection alone");
};

subtest 'a script with many open files' => sub {
    my @files;
    while (@files < 1100) { open my $file, '<', '/dev/null' or last; push @files, $file }
    plan skip_all => 'fewer than 1024 files may be open' if @files < 1100;
    my $late = CPANBridge->new(socket => $daemon->path, timeout => 30);
    is($late->call_python('m', 'f', 'd')->[1], 'd', 'has calls all the same');
    cmp_ok(fileno handle($late), '>', 1023, '... with a file number beyond 1023');
};

subtest 'disconnect' => sub {
    $bridge->disconnect;
    is(handle($bridge), undef, 'gives the connection back');
    is($bridge->call_python('m', 'f', 'e')->[1], 'e', 'and the next call opens another');
    $bridge->disconnect for 1 .. 2;
    pass('twice does no harm');
};

subtest 'a thread has a connection of its own' => sub {
    plan skip_all => 'this Perl has no threads' if !$Config{useithreads} || !eval { require threads; 1 };
    my $before = $bridge->call_python('m', 'f', 'g')->[0];
    my @threads = map {
        my $name = $_;
        threads->create(sub { scalar grep { my $result = $bridge->call_python('m', 'f', "$name-$_");
                    $result->[0] != $before && $result->[1] eq "$name-$_" } 1 .. 50 });
    } 1 .. 3;
    is($_->join, 50, 'another than its parent, and its own replies') for @threads;
    is_deeply($bridge->call_python('m', 'f', 'h')->[1], 'h', "... whose own goes on");
};

done_testing;
