use strict;
use warnings;

use Test::More;

use lib 't/lib';
use CPANBridge;
use CPANBridge::Clock;
use FakeDaemon;

# A bridge to a daemon that serves its connections with the code.
sub bridge_to {
    my ($serve, %options) = @_;
    my $daemon = FakeDaemon->start($serve);
    return ($daemon, CPANBridge->new(socket => $daemon->path, timeout => 30, %options));
}

sub ran { my ($daemon, $name) = @_; return scalar grep { $_ eq "request $name" } $daemon->noted }

subtest 'the request' => sub {
    my ($daemon, $bridge) = bridge_to(
        sub {
            my ($connection) = @_;
            while (1) {
                my $request = $connection->read_request;
                $connection->reply($request, $request);
            }
        },
        timeout => 7.5,
    );
    my $sent = $bridge->call_python('mod', 'fun', { a => 1 });
    is_deeply([ sort keys %{$sent} ],
        [qw(client_version function module params perl_caller request_id timeout timestamp)], 'its fields');
    is($sent->{module} . '.' . $sent->{function}, 'mod.fun', 'module and function');
    is($sent->{client_version}, 'CPANBridge.pm/0.6.0', 'client_version');
    cmp_ok(abs($sent->{timestamp} - time), '<', 60, 'timestamp');
    ok($sent->{timeout} > 0 && $sent->{timeout} <= 7.5, 'timeout is what is left of it');
    like($sent->{perl_caller}, qr/\A.*30-exchange\.t:[0-9]+\z/, 'perl_caller outside of a sub');
    sub Some::Where::report { return $_[0]->call_python('a', 'b') }
    my $reported = Some::Where::report($bridge);
    is($reported->{perl_caller}, 'Some::Where::report', '... and in one');
    ok(!exists $reported->{params}, 'no params without params');
    isnt($reported->{request_id}, $sent->{request_id}, 'each request has an id of its own');
    is_deeply($bridge->call_python('a', 'b', $_)->{params}, $_, 'params as they are')
        for [], {}, [ 1, 'x' ], 'text', 5, [ [] ];
    my ($package, $name) = ('L' x 180, 'n' x 100);
    eval "package $package; sub $name { return \$_[0]->call_python('a', 'b') } 1" or die $@;
    is($package->can($name)->($bridge)->{perl_caller}, substr("${package}::$name", -200),
        'at most 200 characters of perl_caller');
    is($bridge->get_performance_stats->{reconnects}, 0, 'all on one connection');
};

subtest 'a failed call' => sub {
    my ($daemon, $bridge) = bridge_to(
        sub {
            my ($connection) = @_;
            while (1) {
                my $request = $connection->read_request;
                $connection->fail($request, error => 'Error in m.f: boom', error_type => 'ValueError',
                    traceback => 'Traceback', retry_after => 1.5);
            }
        }
    );
    my $result = $bridge->call_python('m', 'f');
    like(delete $result->{duration},   qr/\A[0-9.e-]+\z/, 'has its duration');
    like(delete $result->{request_id}, qr/\A[0-9a-f-]+\z/, '... and request_id');
    is_deeply($result, { success => 0, error => 'Error in m.f: boom', error_type => 'ValueError', module => 'm',
            function => 'f', traceback => 'Traceback', retry_after => 1.5 }, '... and all else');
    is($bridge->get_last_error . '', 'Error in m.f: boom', 'get_last_error');
    my $line = __LINE__ + 1;
    eval { $bridge->call('m', 'f') };
    isa_ok($@, 'CPANBridge::Error');
    is("$@", "Error in m.f: boom at $0 line $line.\n", 'call dies with the place of the call');
    is($@->error_type . $@->module . $@->function . $@->traceback, 'ValueErrormfTraceback', '... and all fields');
    my $stats = $bridge->get_performance_stats;
    is($stats->{failed_calls} . $stats->{successful_calls} . $stats->{total_calls}, '202', 'the statistics');
    cmp_ok($stats->{bytes_sent}, '>', 300, 'bytes_sent');
    cmp_ok($stats->{bytes_received}, '>', 200, 'bytes_received');
};

subtest 'a result that looks like a failure' => sub {
    my ($daemon, $bridge) = bridge_to(sub { $_[0]->echo });
    is_deeply($bridge->call('m', 'f', { success => 0, error => 'x' }), { success => 0, error => 'x' }, 'call returns it');
    is($bridge->get_last_error, undef, '... and there was no error');
    is($bridge->call('m', 'f'), undef, 'null is a result');
};

subtest 'a call that may have run is not repeated' => sub {
    for my $case (
        [ 'closed before the reply', sub { } ],
        [ 'half a length',           sub { $_[0]->send_bytes("\0\0") } ],
        [ 'half a reply',            sub { $_[0]->send_bytes("\0\0\0\x50{\"success\":") } ],
        )
    {
        my ($name, $instead) = @{$case};
        my ($daemon, $bridge) = bridge_to(
            sub {
                my ($connection, $number) = @_;
                return $connection->echo if $number > 1;
                $connection->read_request;
                $instead->($connection);
            }
        );
        my $result = $bridge->call_python('m', 'once');
        is($result->{error_type}, 'WorkerLost', "$name: WorkerLost");
        like($result->{error}, qr/may have run/, '... says what is not known');
        is_deeply($bridge->call_python('m', 'f', [1]), [1], '... and the next call works');
        is(ran($daemon, 'once'), 1, '... and it was sent once');
    }
};

subtest 'a call that certainly was not run is sent again' => sub {
    my ($daemon, $bridge) = bridge_to(
        sub {
            my ($connection, $number) = @_;
            return $connection->echo if $number > 2;
            $connection->read_request;
            $connection->no_more_requests;
        }
    );
    is_deeply($bridge->call_python('m', 'f', [1]), [1], 'after frames of length 0');
    is($bridge->get_performance_stats->{retries}, 2, '... two of them');

    ($daemon, $bridge) = bridge_to(sub { $_[0]->no_more_requests });
    my $result = $bridge->call_python('m', 'f');
    is($result->{error_type}, 'ShuttingDown', 'but not without end');
    like($result->{error}, qr/was not run/, '... which says that it was not run');
};

subtest 'a kept connection that the daemon has closed' => sub {
    for my $ending ('no_more_requests', 'note') {
        my ($daemon, $bridge) = bridge_to(
            sub {
                my ($connection) = @_;
                $connection->reply($connection->read_request);
                $connection->$ending('end');
                close $connection->{socket};
                $connection->note('closed');
            }
        );
        is_deeply($bridge->call_python('m', 'f', [1]), [1], 'a call');
        ok($daemon->wait_until_noted('closed'), '... then the daemon closes');
        is_deeply($bridge->call_python('m', 'f', [2]), [2], '... and the next call opens another');
        is($bridge->get_performance_stats->{reconnects}, 1, '... as the statistics tell');
        is($bridge->get_performance_stats->{retries},    0, '... before anything is sent');
    }
};

subtest 'a daemon that was restarted' => sub {
    my ($daemon, $bridge) = bridge_to(sub { $_[0]->echo });
    is_deeply($bridge->call_python('m', 'f', [1]), [1], 'before');
    $daemon->stop;
    my $next = FakeDaemon->start(sub { $_[0]->echo }, folder => $daemon->{folder});
    is_deeply($bridge->call_python('m', 'f', [2]), [2], 'after');
};

subtest 'replies that are not valid' => sub {
    my %replies = (
        'not JSON'              => sub { $_[0]->frame('garbage') },
        'not an object'         => sub { $_[0]->frame('[]') },
        'not UTF-8'             => sub { $_[0]->frame("\"\xff\"") },
        'another request'       => sub { $_[0]->frame('{"success":true,"result":1,"request_id":"other"}') },
        'no request_id'         => sub { $_[0]->frame('{"success":true,"result":1}') },
        'without a result'      => sub { my $reply = $_[0]->success($_[1]); $reply =~ s/"result"/"resulx"/; $reply },
    );
    for my $what (sort keys %replies) {
        my ($daemon, $bridge) = bridge_to(
            sub {
                my ($connection, $number) = @_;
                return $connection->echo if $number > 1;
                my $request = $connection->read_request;
                $connection->send_bytes($replies{$what}->($connection, $request));
                $connection->wait_for_end;
            }
        );
        my $result = $bridge->call_python('m', 'f');
        is($result->{error_type}, 'InvalidReply', "$what: InvalidReply");
        is_deeply($bridge->call_python('m', 'f', [1]), [1], '... and the next call has a new connection');
    }
};

# A reply as cpanbridged formats it, with the result as JSON.
sub worded {
    my ($connection, $request, $result, $more) = @_;
    return $connection->frame(qq({"result":$result,$more"module":"$request->{module}","function":"$request->{function}",)
        . qq("request_id":"$request->{request_id}","execution_info":{"worker":0},"success":true}));
}

subtest 'results that look like the end of a reply' => sub {
    my $end = '","module":"m","function":"f","request_id":"ID","execution_info":{"worker":0},"success":true}';
    my %results = (
        'in an object'  => [ qq({"x":"$end), { x => '', module => 'm', function => 'f', request_id => 'ID',
                execution_info => { worker => 0 }, success => 1 } ],
        'in a string'   => [ CPANBridge::JSON::encode($end), $end ],
        'in two arrays' => [ qq([[{"x":"$end]]), [ [ { x => '', module => 'm', function => 'f', request_id => 'ID',
                execution_info => { worker => 0 }, success => 1 } ] ] ],
    );
    for my $where (sort keys %results) {
        my ($json, $expected) = @{ $results{$where} };
        my ($daemon, $bridge) = bridge_to(
            sub {
                my ($connection) = @_;
                my $request = $connection->read_request;
                (my $own = $json) =~ s/ID/$request->{request_id}/;
                $connection->send_bytes(worded($connection, $request, $own, ''));
                $connection->wait_for_end;
            }
        );
        { package Numbered; our @ISA = ('CPANBridge'); our $id; sub call_finished { $id = $_[1]{request_id} } }
        my $result = Numbered->new(socket => $daemon->path)->call('m', 'f');
        my $text   = CPANBridge::JSON::encode([$result]);
        $text =~ s/\Q$Numbered::id\E/ID/;
        is_deeply(CPANBridge::JSON::decode($text), [$expected], $where);
    }
};

subtest 'a reply that is worded in another way' => sub {
    my %replies = (
        'a further field'        => sub { worded(@_, '{"a":[1]}', '"further":{"b":2},') },
        'another order'          => sub { my $reply = worded(@_, '{"a":[1]}', ''); $reply =~ s/\A.{4}\{("result":.*),("success":true)\}\z/{$2,$1}/s;
            $_[0]->frame($reply) },
        'white space'            => sub { worded(@_, ' { "a" : [ 1 ] } ', '') },
        'characters after it'    => sub { my $reply = worded(@_, '{"a":[1]}', ''); $reply =~ s/\A.{4}(.*)"worker":0/$1"place":"\xc3\xbc"/s;
            $_[0]->frame($reply) },
    );
    for my $what (sort keys %replies) {
        my ($daemon, $bridge) = bridge_to(
            sub {
                my ($connection) = @_;
                $connection->send_bytes($replies{$what}->($connection, $connection->read_request));
                $connection->wait_for_end;
            }
        );
        is_deeply($bridge->call('m', 'f'), { a => [1] }, $what);
    }
    my ($daemon, $bridge) = bridge_to(
        sub {
            my ($connection) = @_;
            $connection->send_bytes(worded($connection, $connection->read_request, '[1', ''));
            $connection->wait_for_end;
        }
    );
    is($bridge->call_python('m', 'f')->{error_type}, 'InvalidReply', 'but half a result is none');
};

subtest 'names of any characters' => sub {
    my ($daemon, $bridge) = bridge_to(sub { my $c = shift; while (1) { my $r = $c->read_request; $c->reply($r, $r) } });
    { package Odd; our @ISA = ('CPANBridge'); our $caller; sub perl_caller { return $caller } }
    my $odd = Odd->new(socket => $daemon->path);
    for my $name ('a"b', 'a\\b', "a\n", "\xfc", "\x{20ac}", '7', 7, '1.0', 'true') {
        $Odd::caller = $name;
        my $sent = $odd->call($name, "f$name", [$name]);
        is_deeply([ @{$sent}{qw(module function perl_caller)} ], [ $name, "f$name", $name ], sprintf('they arrive: %vd', $name));
    }
    undef $Odd::caller;
    is($odd->call('m', 'f')->{perl_caller}, undef, 'and no caller is undef');
    no warnings;
    like($bridge->call_python("\x{d800}", 'f')->{error}, qr/\Athe module cannot be sent: /, 'half of a pair is refused');
};

subtest 'who does not speak the protocol' => sub {
    my ($daemon, $bridge) = bridge_to(
        sub {
            my ($connection) = @_;
            $connection->read_request;
            $connection->send_bytes("HTTP/1.1 400 Bad Request\r\n\r\n");
            $connection->wait_for_end;
        }
    );
    { package Keys; our @ISA = ('CPANBridge'); our %keys; sub call_finished { %keys = %{ $_[1] } } }
    my $result = Keys->new(socket => $daemon->path)->call_python('m', 'f');
    is($result->{error_type}, 'InvalidReply', 'error_type');
    like($result->{error}, qr/begins with 'HTTP', not with a length: not a cpanbridged\?/, 'the message');
    is_deeply([ sort keys %Keys::keys ], [qw(duration function module outcome params request_id)], 'what call_finished gets');
};

subtest 'an error without an id belongs to the request that could not be read' => sub {
    my ($daemon, $bridge) = bridge_to(
        sub {
            my ($connection) = @_;
            my $request = $connection->read_request;
            $connection->fail({}, error => 'too large', error_type => 'InvalidRequest');
            $connection->no_more_requests;
        }
    );
    is($bridge->call_python('m', 'f')->{error_type}, 'InvalidRequest', 'error_type');
};

subtest 'sizes' => sub {
    my ($daemon, $bridge) = bridge_to(sub { $_[0]->echo }, max_json_size => 2000);
    my $result = $bridge->call_python('m', 'big', [ 'x' x 2000 ]);
    is($result->{error_type}, 'InvalidRequest', 'a request that is too large');
    like($result->{error}, qr/has 2[0-9]{3} bytes; at most 2000 are allowed \(max_json_size\)/, '... says how large');
    is_deeply($bridge->call_python('m', 'f', [1]), [1], '... and others go on');
    is(ran($daemon, 'big'), 0, '... and was not sent');

    for my $length (3000, 0xffffffff) {
        ($daemon, $bridge) = bridge_to(
            sub {
                my ($connection, $number) = @_;
                return $connection->echo if $number > 1;
                $connection->read_request;
                $connection->send_bytes(pack('N', $length) . 'x' x 500);
                $connection->wait_for_end;
            },
            max_json_size => 2000,
        );
        $result = $bridge->call_python('m', 'f');
        is($result->{error_type}, 'ReplyTooLarge', "a reply of $length bytes");
        like($result->{error}, qr/$length bytes; at most 2000/, '... says how large');
        is_deeply($bridge->call_python('m', 'f', [1]), [1], '... and the next call works');
    }
    ($daemon, $bridge) = bridge_to(sub { $_[0]->echo });
    my $large = 'x' x 5_000_000;
    ok($bridge->call_python('m', 'f', [$large])->[0] eq $large, '5 MB there and back');
};

subtest 'what cannot be sent' => sub {
    my ($daemon, $bridge) = bridge_to(sub { $_[0]->echo });
    my $result = $bridge->call_python('m', 'f', { rows => [ 1, sub { } ] });
    is($result->{error_type}, 'InvalidParams', 'error_type');
    like($result->{error}, qr/\A\$params->\{rows\}\[1\] cannot be sent/, 'its place');
    is($bridge->call_python(undef, 'f')->{error_type}, 'InvalidRequest', 'no module');
    is($bridge->call_python('m', [])->{error_type},    'InvalidRequest', 'no function');
};

subtest "the script's variables" => sub {
    my ($daemon, $bridge) = bridge_to(sub { $_[0]->echo });
    local ($@, $_, $,, $\, $/) = ('error', 'topic', ',', '!', 'x');
    local $! = 5;
    local $? = 6;
    my $alarm = $SIG{ALRM} = sub { };
    my $died = 0;
    local $SIG{__DIE__} = sub { $died++ };
    my $good = $bridge->call_python('m', 'f', [1]);
    my $bad  = $bridge->call_python('m', 'f', [ sub { } ]);
    my @seen = ($@, $_, $,, $\, $/, $! + 0, $?, $SIG{ALRM} == $alarm, $died);
    ($,, $\, $/) = (undef, undef, "\n");
    is_deeply(\@seen, [ 'error', 'topic', ',', '!', 'x', 5, 6, 1, 0 ], 'are left alone');
};

subtest 'debug' => sub {
    my ($daemon, $bridge) = bridge_to(sub { $_[0]->echo }, debug => 1);
    open my $stderr, '>&', \*STDERR or die $!;
    close STDERR;
    my $written = '';
    open STDERR, '>', \$written or die $!;
    {
        local ($,, $\) = ('-', '!');
        $bridge->call_python('m', 'f', ['secret']);
        $bridge->call_python('m', 'g', [ sub { } ]);
    }
    close STDERR;
    open STDERR, '>&', $stderr or die $!;
    like($written, qr/\ACPANBridge: m\.f [0-9.]+ ms ok\nCPANBridge: m\.g [0-9.]+ ms InvalidParams\n\z/, 'one line per call');
};

subtest 'a subclass' => sub {
    {
        package Logged;
        our @ISA = ('CPANBridge');
        sub new {
            my ($class, %options) = @_;
            my $name = delete $options{name};
            my $self = $class->SUPER::new(%options);
            $self->{name} = $name;
            return $self;
        }
        sub call_finished { my ($self, $call) = @_; push @{ $self->{log} }, "$self->{name} $call->{function}"; return }
        sub fetch { my ($self, @call) = @_; return $self->call_python(@call) }
    }
    my ($daemon) = bridge_to(sub { my $c = shift; while (1) { my $r = $c->read_request; $c->reply($r, $r) } });
    my $bridge = Logged->new(socket => $daemon->path, name => 'N');
    my $sent = $bridge->fetch('m', 'f');
    is_deeply($bridge->{log}, ['N f'], 'may have options, fields and hooks of its own');
    like($sent->{perl_caller}, qr/30-exchange/, '... and is not taken for the caller');
    isa_ok($bridge->new, 'Logged');
};

subtest 'a helper that was written for the first client' => sub {
    {
        package CryptHelper;
        our @ISA = ('CPANBridge');
        sub new {
            my ($class, %args) = @_;
            my $self   = $class->SUPER::new(%args);
            my $result = $self->call_python('crypto', 'new', { cipher => $args{-cipher} });
            die "no cipher: $result->{error}" if !$result->{success};
            $self->{cipher} = $result->{result}{cipher};
            return $self;
        }
        sub call_python { my ($self, @call) = @_; return $self->call_outcome(@call) }
    }
    my ($daemon) = bridge_to(
        sub {
            my ($connection) = @_;
            $connection->reply($connection->read_request);
            $connection->fail($connection->read_request, error => 'no', error_type => 'KeyError');
        }
    );
    my $helper = CryptHelper->new(-cipher => 'AES', -key => 'k', socket => $daemon->path);
    is($helper->{cipher}, 'AES', 'gets success and result');
    my $outcome = $helper->call_python('m', 'f');
    is_deeply([ @{$outcome}{qw(success error error_type function)} ], [ 0, 'no', 'KeyError', 'f' ], '... or the failure');
};

done_testing;
